"""4-bit base models of every family, on the CPU: equal to their own unpacked weights, forward and backward."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from memdlm.errors import CheckpointError, ConfigError
from memdlm.inference import GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import build_model, load_model
from memdlm.models.blocks.dit import Conditioning
from memdlm.models.blocks.experts import Experts
from memdlm.models.quantisation.four_bit import is_four_bit
from tiny import CONFIGS, MASK, random_ids, rng, tiny

bitsandbytes = pytest.importorskip("bitsandbytes")
bnb_layers = pytest.importorskip("memdlm.models.quantisation.bnb_layers")
every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
ROOT = Path(__file__).parents[2]
LINEAR = bitsandbytes.nn.Linear4bit


def four_bit(family, folder, dtype="auto"):
    tiny(family).save_pretrained(folder)
    return load_model(folder, dtype=dtype, load_in_4bit=True)


@torch.no_grad()
def unpacked(model):
    """An ordinary model with the values that the 4-bit `model` computes with."""
    plain = build_model(model.config.__class__.from_dict(CONFIGS[model.family_for_test]().to_dict()), seed=0)
    plain = plain.to(model.dtype).eval()
    state = {name: value for name, value in model.state_dict().items() if value.dtype != torch.uint8}
    for path, module in model.named_modules():
        if isinstance(module, LINEAR):
            state[f"{path}.weight"] = module.unpacked()
        elif isinstance(module, Experts):
            for name in ("gate_up_proj", "down_proj"):
                state[f"{path}.{name}"] = getattr(module, name).unpacked()
    names = set(plain.state_dict())
    plain.load_state_dict({name: value for name, value in state.items() if name in names})
    return plain


@pytest.fixture(params=sorted(CONFIGS))
def pair(request, tmp_path):
    model = four_bit(request.param, tmp_path)
    model.family_for_test = request.param
    return model, unpacked(model)


def relative(a, b):
    is_possible = b > -1e5  # MDLM never predicts its mask
    return ((a - b)[is_possible].norm() / b[is_possible].norm()).item()


def gradient(model, ids):
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    (found,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().mean(), embedded)
    return found


# What is quantised --------------------------------------------------------------------------------------------------


@every_family
def test_all_linear_layers_and_experts_are_packed_but_routers_and_the_output(family, tmp_path):
    model = four_bit(family, tmp_path)
    assert is_four_bit(model)
    assert not model.training
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            is_left_alone = leaf in ("gate", "lm_head") or isinstance(module, Conditioning)
            assert isinstance(module, LINEAR) is not is_left_alone, path
            if isinstance(module, LINEAR):
                assert module.weight.quant_state.nested
                assert module.weight.quant_state.quant_type == "nf4"
        if isinstance(module, Experts):
            assert {p.dtype for p in module.parameters()} == {torch.uint8}
            assert module.down_proj.state.nested
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert not any(p.requires_grad for p in packed)
    whole = sum(p.numel() for p in tiny(family).parameters())
    rest = sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8)
    assert 2 * sum(p.numel() for p in packed) == whole - rest


@every_family
def test_packing_rounds_weights_by_a_tenth(family, tmp_path):
    model = four_bit(family, tmp_path)
    model.family_for_test = family
    exact = tiny(family).state_dict()
    for name, value in unpacked(model).state_dict().items():
        if not value.equal(exact[name]):
            assert relative(value, exact[name]) < 0.12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 40, 64), (24, 33), (1, 7)])
def test_quantising_in_pieces_gives_the_bits_of_bitsandbytes(shape, dtype, monkeypatch):
    monkeypatch.setattr(bnb_layers, "PIECE", 128)
    weight = (torch.randn(shape, generator=rng()) * 0.3).to(dtype)
    ours = bnb_layers.quantise(weight, nn.Module())
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert ours.data.equal(packed)
    assert ours.quant_state.absmax.equal(state.absmax)
    assert ours.quant_state.offset == state.offset
    assert ours.quant_state.state2.absmax.equal(state.state2.absmax)
    assert (ours.quant_state.shape, ours.quant_state.dtype) == (state.shape, state.dtype)


@torch.no_grad()
def test_a_converted_decoder_is_quantised_too_and_a_model_without_blocks_is_refused(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        is_causal=False,
    )
    for layers in (2, 0):
        config.num_hidden_layers = layers
        config.layer_types = ["full_attention"] * layers
        transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / str(layers))
    model = load_model(tmp_path / "2", load_in_4bit=True)
    assert sum(isinstance(module, LINEAR) for module in model.modules()) == 14
    assert model(random_ids(2, 5)).logits.isfinite().all()
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM has no linear layers in numbered blocks"):
        load_model(tmp_path / "0", load_in_4bit=True)


# What it computes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_the_unpacked_weights(pair):
    model, plain = pair
    ids = random_ids(3, 9)
    assert relative(model(ids).logits, plain(ids).logits) < 1e-5


def test_gradients_reach_the_input_in_every_mode_also_after_inference(pair):
    model, plain = pair
    ids = random_ids(2, 9)
    expected = gradient(plain, ids)
    for mode in (model.eval, model.train, model.eval):
        mode()
        with torch.no_grad():
            model(ids)
        assert relative(gradient(model, ids), expected) < 1e-5


def test_the_model_mode_is_the_users_and_the_packed_layers_is_not(pair):
    model, _ = pair
    packed = [module for module in model.modules() if isinstance(module, LINEAR)]
    for mode in (True, False, True, False):
        model.train(mode)
        assert model.training == mode
        assert model.model.layers[0].training == mode
        assert all(module.training for module in packed)
    with torch.no_grad():
        model(random_ids(1, 4))
    assert not any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in packed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_inputs_without_rows_and_experts_without_tokens_are_harmless(dtype, tmp_path):
    model = four_bit("lladamoe", tmp_path, dtype)
    layer = model.model.layers[1]
    width = model.config.hidden_size
    nothing = torch.zeros(0, width, dtype=model.dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert layer.self_attn.q_proj(nothing).shape == (0, width)
            chosen = torch.zeros(0, 2, dtype=torch.int64)
            assert layer.mlp.experts(nothing, chosen, torch.zeros(0, 2, dtype=model.dtype)).shape == (0, width)
            one = torch.randn(5, width, generator=rng()).to(model.dtype)
            same = torch.zeros(5, 1, dtype=torch.int64)
            assert layer.mlp.experts(one, same, torch.ones(5, 1, dtype=model.dtype)).isfinite().all()


def test_nothing_unpacked_is_kept_for_the_backward_pass(tmp_path):
    model = four_bit("lladamoe", tmp_path)
    kept = []
    embedded = model.model.embed_tokens(random_ids(2, 9)).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(inputs_embeds=embedded)
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    others = [t for t in kept if t.data_ptr() not in owned]
    weights = {tuple(m.weight.quant_state.shape) for m in model.modules() if isinstance(m, LINEAR)}
    assert others
    assert not [t for t in others if t.dim() == 3 and t.shape[0] == model.config.num_experts]
    assert not [t for t in others if tuple(t.shape) in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [16, 48, 64, 96, 100, 192, 33])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rows_of_any_width_are_multiplied_right(wide, rows, dtype):
    weight = (torch.randn(24, wide, generator=rng()) * 0.3).to(dtype)
    plain = nn.Linear(wide, 24).to(dtype)
    layer = bnb_layers.Linear4bit(plain, dtype)
    layer.weight = bnb_layers.quantise(weight, layer)
    layer.bias = plain.bias
    plain.weight.data = layer.unpacked()
    assert relative(plain.weight.float(), weight.float()) < 0.12
    layer.eval()
    x = torch.randn(rows, wide, generator=rng(1)).to(dtype)
    with torch.no_grad():
        inferred = layer(x)
    x.requires_grad_()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    results = [(inferred, plain(x)), (layer(x), plain(x))]
    results.append([torch.autograd.grad(network(x).sum(), x)[0] for network in (layer, plain)])
    for ours, expected in results:
        assert ours.dtype == dtype
        assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_products_with_packed_experts_differentiate_twice(pair):
    model, plain = pair
    ids = random_ids(1, 5)
    seconds = []
    for network in (model, plain):
        embedded = network.model.embed_tokens(ids).detach().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = network(inputs_embeds=embedded).logits.square().mean()
            (first,) = torch.autograd.grad(loss, embedded, create_graph=True)
            (second,) = torch.autograd.grad(first.square().mean(), embedded)
        seconds.append(second)
    assert relative(*seconds) < 1e-4


def stack_of(experts, out, wide, dtype):
    weight = (torch.randn(experts, out, wide, generator=rng()) * 0.3).to(dtype)
    return bnb_layers.Stacked4bit(bnb_layers.quantise(weight, nn.Module()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(6, 16, 4), (16, 24, 40), (64, 96, 128)])
def test_some_experts_are_unpacked_to_the_same_bits(size, dtype):
    stack = stack_of(*size, dtype)
    chosen = torch.tensor([size[0] - 1, 0, 2, 2, 5])
    assert stack.is_divisible
    assert stack.unpacked_some(chosen).equal(stack.unpacked()[chosen])


@pytest.mark.parametrize("rows", [3, 40])
def test_the_gradient_of_a_sum_is_taken_too(rows):
    stack = stack_of(16, 24, 40, torch.float32)
    expert = torch.randint(0, 16, (rows,), generator=rng(2)).sort().values
    x = torch.randn(rows, 40, generator=rng(3)).requires_grad_()
    (found,) = torch.autograd.grad(stack.product(x, torch.bincount(expert, minlength=16).cumsum(0).int()).sum(), x)
    assert_close(found, stack.unpacked()[expert].sum(1))


def test_experts_that_share_blocks_are_unpacked_all(monkeypatch):
    stack = stack_of(8, 3, 7, torch.float32)
    assert not stack.is_divisible
    with pytest.raises(ConfigError, match=r"share blocks of 64"):
        stack.unpacked_some(torch.tensor([1]))
    x = torch.randn(2, 7, generator=rng(1))
    ends = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2], dtype=torch.int32)
    assert_close(stack.product(x, ends), torch.stack([stack.unpacked()[e] @ r for e, r in zip((2, 5), x, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 40])
def test_few_rows_give_what_all_experts_give(rows, dtype, monkeypatch):
    """Forward, backward and the gradient's own gradient, up to half as many rows as experts, and above."""
    stack = stack_of(16, 24, 40, dtype)
    expert = torch.randint(0, 16, (rows,), generator=rng(2)).sort().values
    ends = torch.bincount(expert, minlength=16).cumsum(0).int()
    unpacked, plain = [], stack.unpacked()
    whole, some = type(stack).unpacked, type(stack).unpacked_some
    monkeypatch.setattr(type(stack), "unpacked", lambda self: unpacked.append(16) or whole(self))
    monkeypatch.setattr(type(stack), "unpacked_some", lambda self, e: unpacked.append(len(e)) or some(self, e))
    results = []
    for product in (stack.product, lambda x, ends: torch.einsum("noi,ni->no", plain[expert], x)):
        x = torch.randn(rows, 40, generator=rng(3)).to(dtype).requires_grad_()
        out = product(x, ends)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((out, first, second))
    # The product, its gradient, and twice what differentiates both.
    assert unpacked == [rows if rows <= 8 else 16] * 4
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert relative(ours.float(), expected.float()) < tolerance


# Memory, generation -------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_written_after_generation_and_leaves_no_trace(family, dtype, tmp_path, word_tokenizer):
    model = four_bit(family, tmp_path, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = ParametricMemory(model, MemoryConfig(inner_layer_fraction=0.5), mask_token_id=word_tokenizer.mask_token_id)
    config = GenerationConfig(max_new_tokens=4, steps=2)
    prompts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12", "w3 w1 w2 w9 w4 w4 w6 w8 w2 w1 w1 w5"]
    plain = generate(model, word_tokenizer, prompts, config)
    result = generate(model, word_tokenizer, prompts, config, memory=memory)
    assert all(len(sequence) > 12 for sequence in (*plain.sequences, *result.sequences))
    ids = random_ids(2, 24)
    with torch.no_grad(), memory.write(ids) as written:
        assert (written.grad_norms > 0).all()
        assert {value.dtype for value in memory.fast.tensors()} == {torch.float32}
        read = model(ids).logits
    assert not read.equal(model(ids).logits)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_memory_of_a_packed_model_equals_that_of_the_unpacked_weights(pair):
    model, plain = pair
    ids = random_ids(2, 16)
    read = []
    for network in (model, plain):
        memory = ParametricMemory(network, MemoryConfig(inner_layer_fraction=0.5), mask_token_id=MASK)
        with torch.no_grad(), memory.write(ids):
            read.append(network(ids).logits)
    assert relative(*read) < 1e-4


# Refusals -----------------------------------------------------------------------------------------------------------


def test_without_bitsandbytes_nothing_is_loaded_in_its_place(tmp_path, monkeypatch):
    tiny("small").save_pretrained(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed.*pip install"):
        load_model(tmp_path, load_in_4bit=True)


def test_float64_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="computes in float32, bfloat16, float16, not in float64"):
        four_bit("lladamoe", tmp_path, "float64")


def test_a_packed_model_is_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="a 4-bit model is not saved"):
        four_bit("small", tmp_path / "base").save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(
    ("family", "name"),
    [("small", "model.layers.0.mlp.up_proj.weight"), ("lladamoe", "model.layers.1.mlp.experts.{e}.down_proj.weight")],
)
def test_tensors_of_the_wrong_size_are_refused(family, name, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for key in {name.format(e=e) for e in range(6)}:
        tensors[key] = tensors[key][:-4].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        load_model(tmp_path, load_in_4bit=True)


def test_continuous_integration_installs_what_these_tests_need():
    dev = (ROOT / "pyproject.toml").read_text().partition("\ndev = [")[2].partition("\n]")[0]
    assert '"bitsandbytes' in dev
    assert any(each.startswith("bitsandbytes==") for each in (ROOT / "constraints.txt").read_text().splitlines())
