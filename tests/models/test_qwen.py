"""The Qwen-shaped families: the networks of transformers under an explicit mask, their files, and what is refused."""

import functools
import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memdlm.errors import CheckpointError, ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import A2DLlamaConfig, BlockCausal, Full, build_model, load_model, load_tokenizer, model_skeleton
from memdlm.models.hub.families import block_size_of, decoding_pattern, shifts_logits
from tiny import QWEN, random_ids, tiny

ALL = ("dream", "sdar", "a2d_qwen2", "a2d_qwen3", "a2d_llama")
every_family = pytest.mark.parametrize("family", ALL)
STOCK = {
    "dream": (Qwen2Config, Qwen2ForCausalLM),
    "a2d_qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "sdar": (Qwen3Config, Qwen3ForCausalLM),
    "a2d_qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "a2d_llama": (LlamaConfig, LlamaForCausalLM),
}


def shaken(family):
    """A model whose biases and norms do something."""
    model, generator = tiny(family), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def edited(folder, **fields):
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@every_family
@pytest.mark.parametrize("pattern", [Full(), BlockCausal(4)], ids=str)
@torch.no_grad()
def test_each_is_the_decoder_of_transformers_under_an_explicit_mask(family, pattern, tmp_path):
    model, ids = shaken(family), random_ids(2, 11)
    model.save_pretrained(tmp_path)
    config_class, network_class = STOCK[family]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta}}
    sizes = {**QWEN, "head_dim": model.config.head_dim, "tie_word_embeddings": model.config.tie_word_embeddings}
    stock = network_class(config_class(**sizes, **rope, attn_implementation="sdpa")).eval()
    missing, unexpected = stock.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    assert not unexpected
    allowed = torch.ones(11, 11).bool() if isinstance(pattern, Full) else pattern.allowed(11, ids.device)
    mask = torch.zeros(1, 1, 11, 11).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = stock(ids, attention_mask=mask).logits
    assert_close(model(ids, attention_pattern=pattern).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switch", ["attention_bias", "mlp_bias"])
@torch.no_grad()
def test_biases_of_llama_are_switched_on_by_their_fields(switch):
    config = A2DLlamaConfig(**QWEN, **{switch: True})
    from_stock = LlamaForCausalLM(LlamaConfig(**QWEN, **{switch: True}))
    ours = {name for name, _ in build_model(config, seed=0).named_parameters()}
    assert ours == {name for name, _ in from_stock.named_parameters()}


@every_family
def test_files_keep_their_names_model_type_and_bits(family, tmp_path):
    model = shaken(family)
    model.save_pretrained(tmp_path / "one")
    published = load_file(tmp_path / "one/model.safetensors")
    assert ("lm_head.weight" in published) is not model.config.tie_word_embeddings
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(published)
    for stated in [model.config.model_type, *(["dream"] if family == "dream" else [])]:
        again = load_model(edited(tmp_path / "one", model_type=stated))
        assert type(again) is type(model)
        again.save_pretrained(tmp_path / "two")
        written = json.loads((tmp_path / "two/config.json").read_text())
        assert written["model_type"] == stated
        assert written["architectures"] == [type(model).__name__]
        saved = load_file(tmp_path / "two/model.safetensors")
        assert set(saved) == set(published)
        assert all(saved[name].equal(published[name]) for name in published)


@every_family
def test_architectures_decide_and_then_the_model_type(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    edited(tmp_path, model_type="llada")
    assert type(model_skeleton(tmp_path)) is type(model)
    edited(tmp_path, model_type=model.config.model_type, architectures=None)
    assert type(model_skeleton(tmp_path)) is type(model)
    edited(tmp_path, architectures=["SomethingElse"])
    with pytest.raises(CheckpointError, match=r"SomethingElse.*not known"):
        model_skeleton(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling asks for 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters asks for 'llama3'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"use_mrope": True}, "use_mrope is True"),
        ({"num_experts": 128}, "num_experts is 128.*not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ],
)
@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_what_no_supported_network_has_is_refused_by_its_field(family, fields, message, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(edited(tmp_path, **fields))


def test_the_mixture_of_experts_of_sdar_is_refused_in_words(tmp_path):
    tiny("sdar").save_pretrained(tmp_path)
    edited(tmp_path, architectures=["SDARMoeForCausalLM"], model_type="sdar_moe", num_experts=128)
    with pytest.raises(CheckpointError, match="mixtures of experts"):
        load_model(tmp_path)


@every_family
def test_a_file_of_a_newer_transformers_has_its_base_of_the_frequencies_elsewhere(family, tmp_path):
    model = tiny(family)
    model.config.rope_theta = 5e5
    model.save_pretrained(tmp_path)
    edited(tmp_path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert model_skeleton(tmp_path).config.rope_theta == 5e5


def test_fields_without_an_effect_are_read_and_ignored(tmp_path):
    tiny("sdar").save_pretrained(tmp_path)
    others = {"attn_implementation": "flex_attention", "fuse_cross_entropy": True, "use_deepep": False, "ep_size": 1}
    model = load_model(edited(tmp_path, **others, sliding_window=4096, use_sliding_window=False, rope_scaling=None))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("config_class", "network_class"), list(dict.fromkeys(STOCK.values())))
def test_a_causal_checkpoint_is_refused_with_the_way_to_convert_it(config_class, network_class, tmp_path):
    network_class(config_class(**QWEN)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"autoregressive.*memdlm convert"):
        load_model(tmp_path)


def test_families_know_their_blocks_and_which_position_predicts_which():
    blocks = {family: block_size_of(tiny(family).config) for family in (*ALL, "llada", "llada2", "small")}
    assert blocks == {**dict.fromkeys(blocks), "sdar": 4, "llada2": 32}
    assert [family for family in ALL if shifts_logits(tiny(family).config)] == ["dream"]
    config = tiny("sdar").config
    assert decoding_pattern(config) == BlockCausal(4)
    assert decoding_pattern(config, 8) == BlockCausal(8)
    config.block_size = 16
    assert decoding_pattern(config) == BlockCausal(16)
    config = tiny("a2d_qwen3").config
    assert decoding_pattern(config, 8) == Full()
    config.block_size = 8
    assert decoding_pattern(config) == BlockCausal(8)


QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant"
    "{% if enable_thinking is defined and enable_thinking is false %} <think> </think>{% endif %}{% endif %}"
)


def tokenizer_in(folder, *mask, template=None):
    """A tokenizer as these families have: no BOS, no mask token of its own, PAD and EOS apart."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "user", "assistant", "hi", *mask]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="hi")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[2], pad_token=words[0])
    made.add_special_tokens({"additional_special_tokens": [*words[:3], *mask]})
    made.chat_template = template
    made.save_pretrained(folder)
    return words


@pytest.mark.parametrize(
    ("family", "mask"),
    [("dream", "<|mask|>"), ("sdar", "<|MASK|>"), ("sdar", "<MASK>"), ("a2d_qwen3", "<|mask|>"), ("sdar", "<hole>")],
)
def test_special_tokens_are_found_although_the_tokenizer_does_not_name_them(family, mask, tmp_path):
    config = tiny(family).config
    words = tokenizer_in(tmp_path, mask)
    config.mask_token_id = words.index(mask) if mask == "<hole>" else None
    config.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.mask_token_id == words.index(mask)
    assert tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.eos_token, tokenizer.eot_token) == ("<|im_end|>", "<|im_end|>")


def test_a_tokenizer_without_the_mask_token_is_refused(tmp_path):
    tiny("sdar").config.save_pretrained(tmp_path)
    tokenizer_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"none of <MASK>, <\|MASK\|>"):
        load_tokenizer(tmp_path)


CHAT = [{"role": "user", "content": "hi"}]


def test_answers_begin_behind_an_empty_thinking_block_unless_the_caller_asks(tmp_path):
    tiny("sdar").config.save_pretrained(tmp_path)
    tokenizer_in(tmp_path, "<MASK>", template=QWEN3)
    tokenizer = load_tokenizer(tmp_path)
    render = functools.partial(tokenizer.apply_chat_template, CHAT, tokenize=False, add_generation_prompt=True)
    assert render() == "<|im_start|>user hi <|im_end|><|im_start|>assistant <think> </think>"
    assert render(enable_thinking=True) == "<|im_start|>user hi <|im_end|><|im_start|>assistant"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_a_tokenizer_without_a_template_gets_that_of_qwen(tmp_path):
    told = {}
    for family in ("dream", "sdar"):
        tiny(family).config.save_pretrained(tmp_path)
        tokenizer_in(tmp_path, "<|mask|>", "<|MASK|>")
        told[family] = load_tokenizer(tmp_path).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert told["sdar"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert told["dream"] == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + told["sdar"]


@pytest.mark.parametrize("family", ["sdar", "a2d_qwen3"])
def test_a_memory_is_written_under_the_blocks_that_the_network_was_trained_in(family):
    """What a later block holds does not change the gradient of an earlier one's tokens."""
    model = tiny(family, torch.float64)
    model.config.block_size = 4
    ids, options = random_ids(1, 12), {"inner_layer_fraction": 0.5, "inner_rank": 2, "inner_lr": 0.5}
    changed = ids.where(torch.arange(12) < 4, 5)
    # Only the first block is learned; the rest is there to be seen.
    labels = [each.where(torch.arange(12) < 4, -100) for each in (ids, changed)]

    def written(text, label, **more):
        memory = ParametricMemory(model, MemoryConfig(**options, **more), mask_token_id=31)
        with memory.write(text, label, generator=torch.Generator().manual_seed(1)):
            return [each.detach().clone() for each in memory.fast.tensors()]

    for more, is_same in (({}, True), ({"attention": "decode"}, True), ({"attention": "full"}, False)):
        one, other = (written(text, label, **more) for text, label in zip((ids, changed), labels, strict=True))
        assert all(torch.allclose(a, b) for a, b in zip(one, other, strict=True)) is is_same
    with pytest.raises(ConfigError, match=r"cuts through the blocks of 4 tokens"):
        ParametricMemory(model, MemoryConfig(chunk_length=6), mask_token_id=31)
    assert ParametricMemory(tiny("dream"), MemoryConfig(**options), mask_token_id=31).attention_pattern is None
    assert ParametricMemory(tiny("llada2"), MemoryConfig(**options), mask_token_id=31).attention_pattern is None
