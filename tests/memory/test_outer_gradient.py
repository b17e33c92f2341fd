"""The exact meta-gradient is the derivative of the outer loss: through the start, the rates, and all of the write."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models.blocks import experts
from memdlm.randomness import derive
from tiny import CONFIGS, MASK, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
PROMPT, QUESTION = random_ids(2, 9), random_ids(2, 7, seed=1)


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "inner_target_modules": "up_proj,down_proj", "inner_lr": 0.7, **options}
    if options.get("inner_adapter_type", "lora") == "lora":
        options = {"inner_rank": 4, "inner_alpha": 8.0, **options}
    return ParametricMemory(model, MemoryConfig.recall(**{"strides": 3, **options}), mask_token_id=MASK)


def outer_loss(memory):
    """A loss of another text under what the prompt left behind."""
    with memory.write(PROMPT, generator=rng(3)):
        return memory.model(QUESTION).logits.log_softmax(-1)[..., 5].mean()


def parameters_of(memory):
    learned = [] if memory.learned is None else list(memory.learned.parameters())
    return [p for p in memory.model.parameters() if p.requires_grad] + learned


def shake(memory):
    """Away from the points where derivatives are special: B = 0, rates of 1."""
    with torch.no_grad():
        for index, parameter in enumerate(memory.learned.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=derive("shake", index), dtype=torch.float64) * 0.2)


def directional(memory, parameters):
    """Return the derivative along a random unit direction: by backward pass, and by central differences."""
    outer_loss(memory).backward()
    direction = [torch.randn(p.shape, generator=derive("d", i), dtype=p.dtype) for i, p in enumerate(parameters)]
    size = sum(d.square().sum() for d in direction).sqrt()
    exact = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True) if p.grad is not None) / size
    values, h = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, step in zip(parameters, direction, strict=True):
                parameter.add_(sign * h / size * step)
            values.append(outer_loss(memory))
    return exact, (values[0] - values[1]) / (2 * h)


def check(memory):
    for parameters in (
        [p for p in memory.model.parameters() if p.requires_grad],
        [] if memory.learned is None else list(memory.learned.parameters()),
    ):
        for parameter in parameters_of(memory):
            parameter.grad = None
        if parameters:
            exact, differences = directional(memory, parameters)
            assert exact.abs() > 1e-5
            assert_close(exact, differences, rtol=1e-5, atol=0)


@every_family
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_exact_gradient_is_that_of_finite_differences(family, steps):
    memory = memory_of(tiny(family, torch.float64), num_inner_steps=steps)
    shake(memory)
    check(memory)


@pytest.mark.parametrize("family", ["llada2", "small"])
@pytest.mark.parametrize(
    "options",
    [
        {"masking_strategy": "pmc", "strides": 2, "num_inner_steps": 2},
        {"inner_adapter_type": "full"},
        {"per_sample": False},
        {"inner_layer_fraction": 1.0, "inner_dropout": 0.3, "write_gate": "none"},
        {"inner_grad_clip": 0.05, "inner_clip_scope": "global"},
        {"inner_grad_clip": 0.05, "num_inner_epochs": 2, "num_inner_steps": 1},
        {"learn_start": False, "learn_lr": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_so_it_is_under_every_option(family, options):
    memory = memory_of(tiny(family, torch.float64), **options)
    if memory.learned is not None:
        shake(memory)
    check(memory)


@pytest.mark.parametrize("family", ["llada", "small_windowed"])
def test_fast_weights_in_attention_are_differentiated_through_it(family):
    memory = memory_of(tiny(family, torch.float64), inner_target_modules="q_proj,v_proj,o_proj")
    shake(memory)
    check(memory)


def test_so_it_is_through_an_outer_adapter():
    model = get_peft_model(
        tiny("llada", torch.float64), LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"])
    )
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=derive("B", index), dtype=torch.float64) * 0.1)
    memory = memory_of(model.double())
    shake(memory)
    check(memory)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_family
def test_the_upper_gradient_takes_what_lies_below_as_given(family):
    """Above the boundary `exact_top` is exact; below it the outer loss alone is left, as in first order."""
    model = tiny(family, torch.float64)
    gradients = {}
    for order in ("exact", "exact_top", "first_order"):
        memory = memory_of(model, outer_gradient=order, write_gate="none")
        shake(memory)
        model.zero_grad()
        outer_loss(memory).backward()
        gradients[order] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    first = memory.first_block
    for name, exact in gradients["exact"].items():
        parts = name.split(".")
        is_below = "embed" in name or "after_embedding" in name or (parts[1] == "layers" and int(parts[2]) < first)
        is_tied = "embed_tokens" in name and model.config.tie_word_embeddings
        is_on_both_sides = is_tied or "sigma_map" in name
        if is_below and not is_on_both_sides:
            assert_close(gradients["exact_top"][name], gradients["first_order"][name], rtol=1e-9, atol=1e-12)
        elif not is_on_both_sides:
            assert_close(gradients["exact_top"][name], exact, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(g, gradients["first_order"][name]) for name, g in gradients["exact"].items())


@every_family
def test_first_order_takes_the_steps_as_constants(family):
    """phi_K = phi_0 - sum rate * g: the start gets the gradient of phi_K, a rate the product with its step."""
    memory = memory_of(tiny(family, torch.float64), outer_gradient="first_order")
    shake(memory)
    with memory.write(PROMPT, generator=rng(3)):
        phi = memory.fast.tensors()
        loss = memory.model(QUESTION).logits.square().mean()
        arriving = torch.autograd.grad(loss, phi, retain_graph=True)
        loss.backward()
    for start, gradient, end in zip(memory.learned.starts, arriving, phi, strict=True):
        assert_close(start.grad, gradient.sum(-3, keepdim=True))
        assert not end.is_leaf
    products = [(g * (end - start)).sum() for g, end, start in zip(arriving, phi, memory.learned.starts, strict=True)]
    assert_close(memory.learned.log_rates.grad[0], torch.stack(products))


@pytest.mark.parametrize("family", ["llada2", "lladamoe"])
def test_grouped_products_agree_with_the_looped_oracle(family, monkeypatch):
    """Grouped products have no float64: they agree with the loop in float32, and both with the loop in float64."""
    calls, one_product = [], experts._one_product

    def counted(*arguments):
        calls.append(arguments)
        return one_product(*arguments)

    monkeypatch.setattr(experts, "_one_product", counted)
    gradients, counts = {}, {}
    for name, dtype in (("grouped", torch.float32), ("looped", torch.float32), ("oracle", torch.float64)):
        with monkeypatch.context() as patch:
            if name == "looped":
                patch.setattr(experts, "_has_grouped_product", lambda x, weight: False)
            calls.clear()
            memory = memory_of(tiny(family, dtype))
            shake(memory)
            outer_loss(memory).backward()
            counts[name] = len(calls)
        found = {n: p.grad.double() for n, p in memory.model.named_parameters() if p.grad is not None}
        found |= {n: p.grad.double() for n, p in memory.learned.named_parameters()}
        gradients[name] = found
    assert counts["grouped"] > 20, "experts and their fast weights, in the write and again in its backward pass"
    assert counts["looped"] == counts["oracle"] == 0
    for name, oracle in gradients["oracle"].items():
        for other in ("grouped", "looped"):
            assert (gradients[other][name] - oracle).norm() <= 1e-5 * oracle.norm(), (other, name)


@pytest.mark.parametrize("family", ["small", "llada2"])
def test_what_is_kept_between_the_passes_grows_by_less_than_a_step_s_activations(family):
    """Bytes that autograd holds after a write of K steps; the lower blocks of one state are the only activations."""

    def held(steps, order):
        memory = memory_of(tiny(family), num_inner_steps=steps, outer_gradient=order, strides=4)
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with memory.write(random_ids(4, 64), generator=rng(3)):
                pass
        return sum(kept.values())

    def one_pass():
        model, kept = tiny(family), {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_ids(4, 64))
        return sum(kept.values())

    assert held(4, "exact_top") - held(1, "exact_top") < 3 * one_pass() / 2
    assert held(4, "exact") - held(2, "exact") < 2 * one_pass()


@pytest.mark.parametrize("family", ["lladamoe", "small"])
def test_gradient_checkpointing_changes_nothing(family):
    gradients = []
    for is_on in (False, True):
        memory = memory_of(tiny(family, torch.float64).train(), inner_layer_fraction=1.0, write_gate="none")
        if is_on:
            memory.model.gradient_checkpointing_enable()
        shake(memory)
        with memory.write(PROMPT, generator=rng(3)):
            memory.model(QUESTION).logits.square().mean().backward()
        gradients.append([p.grad for p in parameters_of(memory)])
        assert any(getattr(module, "gradient_checkpointing", False) for module in memory.model.modules()) == is_on
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


def test_outside_of_training_nothing_is_tracked():
    memory = memory_of(tiny("small"))
    with torch.no_grad(), memory.write(PROMPT, generator=rng(3)):
        assert not any(tensor.requires_grad for tensor in memory.fast.tensors())


def test_a_backward_pass_after_the_block_gives_the_same():
    gradients = []
    for is_inside in (True, False):
        memory = memory_of(tiny("llada2", torch.float64), inner_dropout=0.2)
        with memory.write(PROMPT, generator=rng(3)):
            loss = memory.model(QUESTION).logits.square().mean()
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        gradients.append([p.grad for p in parameters_of(memory)])
        assert not any(module._forward_hooks for module in memory.model.modules())
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_what_cannot_be_differentiated_twice_is_refused():
    model = tiny("small")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="'flash_attention_2' cannot be differentiated twice; load the model with"):
        memory_of(model)
    with pytest.raises(ConfigError, match=r"not taken through sums over ranks; set mem_sync_inner=False"):
        MemoryConfig(outer_gradient="exact", per_sample=False, sync_inner=True)
    with pytest.raises(ConfigError, match=r"mem_learned_start_lr=0.1 has no effect without mem_learn_start=True"):
        MemoryConfig(learned_start_lr=0.1)
