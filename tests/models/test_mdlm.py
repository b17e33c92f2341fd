"""MDLM: a reference of the published network, its files, the tokenizer that it has none of, and its sampler."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.testing import assert_close

from memdlm.errors import CheckpointError, ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LoRAOptions, MDLMConfig, add_outer_lora, build_model, load_model, load_tokenizer
from memdlm.models.blocks.dit import Conditioning
from memdlm.models.quantisation.four_bit import linears_of_blocks
from tiny import CONFIGS, MASK, PAD, random_ids, rng, tiny


def shaken():
    """A model in which every tensor does something, also those that start at 0 or 1."""
    model = tiny("mdlm", torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng(index), dtype=torch.float64))
    return model


def published(model, folder):
    """The tensors under their names on disk, in float64, with gradients."""
    model.save_pretrained(folder)
    return {name: value.double().requires_grad_() for name, value in load_file(folder / "model.safetensors").items()}


def reference(t, ids, heads, is_seen=None):
    """The published network, written down again from a description of it: [L] ids -> [L, V] logits."""
    depth = 1 + max(int(name.split(".")[2]) for name in t if name.startswith("backbone.blocks."))

    def affine(name, x):
        return x @ t[f"backbone.{name}.weight"].T + t.get(f"backbone.{name}.bias", 0.0)

    def normalised(name, x, shift, scale):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * t[f"backbone.{name}.weight"] * (1 + scale) + shift

    def turned(x):
        """Heads [L, H, P] as complex numbers, turned by their position."""
        half = x.shape[-1] // 2
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * t["backbone.rotary_emb.inv_freq"].detach()
        spun = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((spun.real, spun.imag), -1)

    noise = torch.tensor([0.0], dtype=torch.float64)  # the published code multiplies the noise level by 0
    rates = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    level = affine("sigma_map.mlp.0", torch.cat(((noise * rates).cos(), (noise * rates).sin())))
    level = affine("sigma_map.mlp.2", level * level.sigmoid())
    condition = level * level.sigmoid()
    x = t["backbone.vocab_embed.embedding"][ids]
    for index in range(depth):
        block = f"blocks.{index}"
        first, second, third, fourth, fifth, sixth = affine(f"{block}.adaLN_modulation", condition).reshape(6, -1)
        inner = normalised(f"{block}.norm1", x, first, second)
        q, k, v = affine(f"{block}.attn_qkv", inner).reshape(len(ids), 3, heads, -1).unbind(1)
        scores = torch.einsum("ihp,jhp->hij", turned(q), turned(k)) / q.shape[-1] ** 0.5
        if is_seen is not None:
            scores = scores.masked_fill(~is_seen, float("-inf"))
        read = torch.einsum("hij,jhp->ihp", scores.softmax(-1), v).flatten(1)
        x = x + third * affine(f"{block}.attn_out", read)
        wide = affine(f"{block}.mlp.0", normalised(f"{block}.norm2", x, fourth, fifth))
        wide = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
        x = x + sixth * affine(f"{block}.mlp.2", wide)
    shift, scale = affine("output_layer.adaLN_modulation", condition).reshape(2, -1)
    return affine("output_layer.linear", normalised("output_layer.norm_final", x, shift, scale))


def test_logits_and_all_gradients_are_those_of_the_published_network(tmp_path):
    model = shaken()
    tensors, ids = published(model, tmp_path), random_ids(1, 9)[0]
    ids[3] = MASK
    ours, theirs = model(ids[None]).logits[0], reference(tensors, ids, heads=4)
    assert_close(ours[:, :MASK], theirs[:, :MASK], rtol=1e-9, atol=1e-9)
    weights = torch.randn(9, MASK, generator=rng(1), dtype=torch.float64)
    (ours[:, :MASK] * weights).sum().backward()
    (theirs[:, :MASK] * weights).sum().backward()
    gradients = {model.published_module_name(name): each.grad for name, each in model.named_parameters()}
    assert set(gradients) == set(tensors) - {"backbone.rotary_emb.inv_freq"}
    for name, gradient in gradients.items():
        assert gradient.any()
        assert_close(gradient, tensors[name].grad, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_padding_on_either_side_is_not_seen(tmp_path):
    model, ids = shaken(), random_ids(1, 6)
    tensors = published(model, tmp_path)
    for before, after in ((0, 3), (3, 0)):
        padded = torch.nn.functional.pad(ids, (before, after), value=PAD)
        is_seen = torch.nn.functional.pad(torch.ones_like(ids), (before, after)).bool()
        found = model(padded, is_seen).logits[0, before : before + 6, :MASK]
        assert_close(found, model(ids).logits[0, :, :MASK])
        assert_close(found, reference(tensors, padded[0], 4, is_seen)[before : before + 6, :MASK])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_mask_token_is_never_predicted(dtype):
    logits = tiny("mdlm", dtype)(random_ids(2, 5)).logits
    assert logits.isfinite().all()
    assert not logits.float().softmax(-1)[..., MASK].any()
    model, others = tiny("mdlm"), MDLMConfig(vocab_size=32, hidden_dim=32, n_heads=4, n_blocks=1, mask_token_id=7)
    assert model.config.mask_row == MASK
    assert build_model(others, seed=0)(random_ids(1, 3)).logits.argmin(-1).eq(7).all()


def test_a_new_network_begins_as_published():
    config = CONFIGS["mdlm"]()
    config.adaln_zero = True
    model = build_model(config, seed=0)
    assert not model(random_ids(1, 4)).logits[..., :MASK].any()
    assert model.model.sigma_map.mlp[0].weight.any()


def edited(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


PUBLISHED = {
    "architectures": ["MDLM"],
    "auto_map": {
        "AutoConfig": "configuration_mdlm.MDLMConfig",
        "AutoModelForMaskedLM": "modeling_mdlm.MDLM",
    },
    "model_type": "mdlm",
    "vocab_size": 32,
    "model_length": 64,
    "hidden_dim": 32,
    "cond_dim": 12,
    "n_blocks": 2,
    "n_heads": 4,
    "dropout": 0.1,
    "time_conditioning": False,
    "torch_dtype": "float32",
    "transformers_version": "4.38.2",
}


@pytest.mark.parametrize("left_out", [(), ("architectures",), ("auto_map", "torch_dtype", "dropout")])
def test_files_as_published_load_and_are_saved_to_the_bit(left_out, tmp_path):
    saved, again = tmp_path / "saved", tmp_path / "again"
    tiny("mdlm").save_pretrained(saved)
    fields = {name: value for name, value in PUBLISHED.items() if name not in left_out}
    (saved / "config.json").write_text(json.dumps(fields))
    load_model(saved).save_pretrained(again)
    written = json.loads((again / "config.json").read_text())
    assert {name: written[name] for name in fields if name not in ("torch_dtype", "transformers_version")} == {
        name: fields[name] for name in fields if name not in ("torch_dtype", "transformers_version")
    }
    one, other = (load_file(folder / "model.safetensors") for folder in (saved, again))
    assert set(one) == set(other)
    assert all(one[name].equal(other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_stored_frequencies_may_be_absent_and_may_not_be_others(tmp_path):
    tiny("mdlm").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "backbone.rotary_emb.inv_freq"
    tensors = load_file(file)
    assert load_model(tmp_path, dtype="bfloat16").model.rotary_emb.inv_freq.equal(tensors[name])
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    assert load_model(tmp_path).model.rotary_emb.inv_freq.equal(tensors[name])
    save_file({**tensors, name: tensors[name] * 0.9}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="other frequencies than those of base 10000"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_conditioning": True}, "time_conditioning is True"),
        ({"n_heads": 5}, "hidden_dim 32 is not a multiple of n_heads 5"),
        ({"n_heads": 32}, "even width"),
        ({"mask_token_id": 32}, "mask_token_id 32 is not below vocab_size 32"),
    ],
)
def test_what_no_published_network_has_is_refused_by_its_field(fields, message, tmp_path):
    tiny("mdlm").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(edited(tmp_path, **fields))
    with pytest.raises(ConfigError, match=message):
        MDLMConfig(**{**PUBLISHED, **fields})


def test_memories_adapters_and_four_bits_leave_the_condition_alone_by_default():
    model = tiny("mdlm")
    memory = ParametricMemory(model, MemoryConfig(inner_layer_fraction=0.5), mask_token_id=MASK)
    assert [site.path for site in memory.fast.sites] == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    named = MemoryConfig(inner_layer_fraction=0.5, inner_target_modules="attn_qkv,mlp.0,o_proj")
    named = ParametricMemory(model, named, mask_token_id=MASK)
    assert [site.path.rpartition(".")[2] for site in named.fast.sites] == ["query_key_value", "o_proj", "up_proj"]
    with pytest.raises(ConfigError, match="'adaLN_modulation', which is no projection"):
        ParametricMemory(model, MemoryConfig(inner_target_modules="adaLN_modulation"), mask_token_id=MASK)
    conditioning = [path for path, module in model.named_modules() if isinstance(module, Conditioning)]
    assert len(conditioning) == 5
    assert {path.rpartition(".")[2] for path in linears_of_blocks(model)} == {
        *("query_key_value", "o_proj", "up_proj", "down_proj")
    }
    adapted = add_outer_lora(tiny("mdlm"), LoRAOptions(r=2))
    assert not any("modulation" in name or "sigma" in name for name, _ in adapted.named_parameters() if "lora" in name)
    also = add_outer_lora(tiny("mdlm"), LoRAOptions(r=2, target_modules="adaLN_modulation"))
    assert sum("lora_A" in name for name, _ in also.named_parameters()) == 3


WORDS = [*sorted(ByteLevel.alphabet()), "he", "ll", "hell", "hello", "<|endoftext|>"]


def write_gpt2(folder):
    """The files that everyone has of GPT-2's tokenizer, with five merges instead of fifty thousand."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\nhell o\n")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    return folder


def checkpoint(folder, **fields):
    MDLMConfig(vocab_size=len(WORDS) + 1, hidden_dim=32, n_blocks=1, n_heads=4, **fields).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["beside the weights", "on the hub"])
def test_the_tokenizer_is_that_of_gpt2_with_the_mask_behind_its_last_token(where, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "model")
    if where == "on the hub":
        # A folder of that name stands for the repository, as transformers looks for it.
        monkeypatch.chdir(tmp_path)
        write_gpt2(tmp_path / "gpt2")
        (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    else:
        write_gpt2(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.mask_token_id == MDLMConfig.from_pretrained(folder).mask_row == len(WORDS) == len(tokenizer) - 1
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.eot_token) == ("<|endoftext|>",) * 3
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer("hello" + tokenizer.mask_token)["input_ids"]) == "hello<|mask|>"
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(folder)
    assert again.mask_token_id == tokenizer.mask_token_id
    assert again("hello there")["input_ids"] == tokenizer("hello there")["input_ids"]


def test_a_tokenizer_that_cannot_be_found_or_does_not_fit_is_refused_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no tokenizer of its own.*'gpt2'.*beside the weights"):
        load_tokenizer(folder)
    write_gpt2(folder)
    with pytest.raises(CheckpointError, match="The mask of this one is token 300"):
        load_tokenizer(edited(folder, vocab_size=301))
    shutil.rmtree(folder)
    load_tokenizer(write_gpt2(checkpoint(folder))).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"id {len(WORDS)}, but the mask of the model is 300"):
        load_tokenizer(edited(folder, vocab_size=301))
    assert load_tokenizer(edited(folder, mask_token_id=len(WORDS))).mask_token_id == len(WORDS)
