"""Models of other families work through the same border: losses, writes, decoding, scoring, chosen positions only."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)
from transformers.modeling_outputs import MaskedLMOutput

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion import Corrupted, Linear, masked_loss
from memdlm.errors import CheckpointError, ConfigError
from memdlm.inference import GenerationConfig, generate, score
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import BlockCausal, ModelDenoiser, load_model, load_tokenizer
from memdlm.models.blocks.structure import blocks_of
from memdlm.models.lora.wrappers import unwrap
from tiny import MASK, PAD, V, random_ids, rng

SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BUILD = {
    # One block that runs twice.
    "albert": lambda: AlbertForMaskedLM(
        AlbertConfig(**SIZES, embedding_size=16, pad_token_id=PAD, initializer_range=0.3)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, pad_token_id=PAD, initializer_range=0.3)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(
            **SIZES,
            pad_token_id=PAD,
            bos_token_id=0,
            eos_token_id=PAD,
            cls_token_id=0,
            sep_token_id=PAD,
            initializer_range=0.3,
            initializer_cutoff_factor=3.0,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, is_causal=False, pad_token_id=PAD, initializer_range=0.3)
    ),
}
TARGETS = {"albert": "ffn,ffn_output", "bert": "dense", "modernbert": "Wi,Wo", "llama": "gate_proj,up_proj,down_proj"}
SHIFTED = {"albert": False, "bert": False, "modernbert": False, "llama": True}
every_model = pytest.mark.parametrize("name", sorted(BUILD))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def foreign(name, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILD[name]().to(dtype).eval()


def memory_of(name, model):
    config = MemoryConfig(
        inner_rank=4, inner_alpha=8.0, inner_layer_fraction=0.5, inner_target_modules=TARGETS[name], inner_lr=0.5
    )
    return ParametricMemory(model, config, mask_token_id=MASK, right_shift_logits=SHIFTED[name])


@every_model
@torch.no_grad()
def test_chosen_positions_are_rows_of_the_whole_and_alone_reach_the_head(name):
    model, ids = foreign(name), random_ids(2, 7)
    whole, seen = model(ids).logits.flatten(0, 1), []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[:-1].numel()))
    positions = torch.tensor([0, 3, 7, 12])
    assert_close(ModelDenoiser(model).logits(ids, positions), whole[positions], **CLOSE)
    assert seen == [4]
    handle.remove()
    shifted = torch.tensor([0, 2, 7, 11])
    assert_close(ModelDenoiser(model, right_shift_logits=True).logits(ids, positions), whole[shifted], **CLOSE)
    states = model.base_model(ids).last_hidden_state.flatten(0, 1)
    assert_close(ModelDenoiser(model).hidden(ids, positions), states[positions], **CLOSE)
    assert_close(model(ids).logits.flatten(0, 1), whole, **CLOSE)


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_is_hidden_and_nothing_is_causal(name, attention):
    model, ids = foreign(name), random_ids(2, 6)
    model.set_attn_implementation(attention)
    lengths, everything = (6, 4), torch.arange(12)
    keep = torch.arange(6) < torch.tensor(lengths)[:, None]
    logits = ModelDenoiser(model, attention_mask=keep).logits(ids, everything).view(2, 6, -1)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits[0]
        assert_close(logits[row, :length], alone, **CLOSE)
    other = ids.clone()
    other[1, 3] = (ids[1, 3] + 1) % PAD
    changed = ModelDenoiser(model, attention_mask=keep).logits(other, everything).view(2, 6, -1)
    assert not torch.allclose(changed[1, 0], logits[1, 0])


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_block_causal_is_honoured(name, attention):
    model, ids = foreign(name), random_ids(1, 8)
    model.set_attn_implementation(attention)
    denoise, everything = ModelDenoiser(model, attention_pattern=BlockCausal(4)), torch.arange(8)
    logits = denoise.logits(ids, everything)
    # transformers' eager attention takes its softmax in float32, whose rounding depends on how many columns there are.
    close = CLOSE if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(logits[:4], model(ids[:, :4]).logits[0], **close)
    assert not torch.allclose(logits[4:], ModelDenoiser(model).logits(ids, everything)[4:])


@every_model
@pytest.mark.parametrize("objective", ["ce", "distill", "distill_hidden"])
def test_a_memory_is_written_read_and_leaves_no_trace(name, objective):
    model, ids = foreign(name), random_ids(2, 9)
    before = model(ids).logits
    config = MemoryConfig(
        inner_rank=4,
        inner_alpha=8.0,
        inner_layer_fraction=0.5,
        inner_target_modules=TARGETS[name],
        inner_loss_type=objective,
        prompt_mask_ratio=0.5,
    )
    memory = ParametricMemory(model, config, mask_token_id=MASK, right_shift_logits=SHIFTED[name])
    with memory.write(ids) as written:
        assert written.losses.shape == (2, 2)
        assert (written.grad_norms > 0).any()
        assert not torch.allclose(model(ids).logits, before)
    assert model(ids).logits.equal(before)
    assert all(parameter.grad is None for parameter in model.parameters())


@every_model
def test_a_ragged_batch_is_written_as_one_by_one(name):
    model, ids, lengths = foreign(name), random_ids(2, 8), (8, 5)
    keep = torch.arange(8) < torch.tensor(lengths)[:, None]
    memory = memory_of(name, model)
    with memory.write(ids, attention_mask=keep, generator=[rng(1), rng(2)]) as written:
        losses = written.losses
        together = [value.clone() for value in memory.fast.tensors()]
    for row, seed in enumerate((1, 2)):
        with memory.write(ids[row : row + 1, : lengths[row]], generator=[rng(seed)]) as alone:
            assert_close(alone.losses[:, 0], losses[:, row], **CLOSE)
            for mine, ours in zip(memory.fast.tensors(), together, strict=True):
                assert_close(mine[0], ours[row], **CLOSE)


@every_model
def test_generating_and_scoring_with_memory(name):
    model = foreign(name, torch.float32)
    tokenizer = build_word_tokenizer([str(i) for i in range(V - 6)])
    memory = ParametricMemory(
        model,
        MemoryConfig(inner_rank=4, inner_layer_fraction=0.5, inner_target_modules=TARGETS[name]),
        mask_token_id=tokenizer.mask_token_id,
        right_shift_logits=SHIFTED[name],
    )
    options = GenerationConfig(max_new_tokens=6, steps=3, right_shift_logits=SHIFTED[name])
    for each in (None, memory):
        result = generate(model, tokenizer, ["1 2 3", "4 5"], options, memory=each)
        assert result.unresolved == 0
        assert [row[:2].tolist() for row in result.sequences] == [tokenizer(t)["input_ids"][:2] for t in ("1 2", "4 5")]
        nll = score(
            model,
            torch.tensor([7, 8, 9]),
            torch.tensor([10, 11]),
            num_samples=8,
            memory=each,
            mask_token_id=tokenizer.mask_token_id,
            right_shift_logits=SHIFTED[name],
        )
        assert 0 < nll < float("inf")


@every_model
def test_an_outer_loss_trains_it_plain_and_under_an_adapter(name):
    ids = random_ids(2, 8)
    is_masked = torch.rand(2, 8, generator=rng(3)) < 0.5
    noised = Corrupted(ids.masked_fill(is_masked, MASK), is_masked, torch.tensor([0.5, 0.5]))
    losses = []
    for adapted in (False, True):
        model = foreign(name)
        if adapted:
            lora = LoraConfig(r=2, target_modules=TARGETS[name].split(","))
            model = get_peft_model(model, lora)
        denoise = ModelDenoiser(model)
        lost = masked_loss(denoise, ids, noised, torch.ones_like(is_masked), schedule=Linear())
        lost.sums.sum().backward()
        losses.append(lost.sums.detach())
        moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
        assert moved
        assert all("lora_" in n for n in moved) == adapted
    assert_close(*losses)


@every_model
def test_it_loads_by_folder_name(name, tmp_path):
    model, ids = foreign(name, torch.float32), random_ids(1, 6)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert_close(again(ids).logits, model(ids).logits)


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    model = foreign("bert", torch.float32)
    model.base_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: cls\.predictions"):
        load_model(tmp_path)


def test_encoders_get_bracketed_turns(tmp_path):
    build_word_tokenizer(["a"]).save_pretrained(tmp_path)
    BertConfig(**SIZES).save_pretrained(tmp_path)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": " q "}]
    text = load_tokenizer(tmp_path).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "[SYS]\ns\n[/SYS]\n\n[Question]\nq\n[/Question]\n\n[Answer]\n"


class Bodiless(nn.Module):
    """A network of no library."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, input_ids, attention_mask=None):
        return MaskedLMOutput(logits=self.table(input_ids))


def test_a_model_without_a_body_still_predicts_but_has_no_hidden_states():
    model, ids = Bodiless(), random_ids(2, 3)
    positions = torch.tensor([1, 5])
    assert ModelDenoiser(model).logits(ids, positions).equal(model(ids).logits.flatten(0, 1)[positions])
    with pytest.raises(ConfigError, match=r"Bodiless has no base model.*use mem_inner_loss_type ce"):
        ModelDenoiser(model).hidden(ids, positions)


@every_model
@pytest.mark.parametrize("objective", ["ce", "distill", "distill_hidden"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_write_shares_what_lies_below_its_first_block(name, objective, wrapped, monkeypatch):
    """The pass is cut at the boundary call, and no layer is written anew: same numbers, fewer calls."""
    model = foreign(name)
    if wrapped:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            targets = TARGETS[name].split(",")
            model = get_peft_model(model, LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).eval()
    keep = torch.ones(2, 9, dtype=torch.int64)
    keep[1, 6:] = 0
    ids, results, calls = random_ids(2, 9), [], []
    blocks = blocks_of(unwrap(model))
    if name == "albert":
        # Its two passes have the same layer, so the calls of the upper one are seen too: four of them are computed
        # again for a gradient, and one reads.
        blocks, upper = unwrap(model).albert.encoder.albert_layer_groups, (4 if objective == "ce" else 8) + 4 + 1
    else:
        upper = 0
    inner = next(module for module in blocks[0].modules() if isinstance(module, nn.Linear))
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    for shared in (True, False):
        memory = ParametricMemory(
            model,
            MemoryConfig(
                inner_rank=4,
                inner_alpha=8.0,
                inner_layer_fraction=0.5,
                inner_target_modules=TARGETS[name],
                inner_loss_type=objective,
                num_inner_epochs=2,
            ),
            mask_token_id=MASK,
        )
        if not shared:
            monkeypatch.setattr(memory, "first_block", 0)
        calls.clear()
        with memory.write(ids, attention_mask=keep, generator=rng()) as record, torch.no_grad():
            results.append([record.losses, *memory.fast.tensors(), model(input_ids=ids, attention_mask=keep).logits])
        states = 2 if objective == "ce" else 3
        assert len(calls) == upper + 1 + (states if shared else 4 if objective == "ce" else 8)
    assert_close(results[0], results[1], **CLOSE)
