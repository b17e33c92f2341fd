"""What a write does not compute twice, and that leaving it out changes nothing."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from memdlm.diffusion import Linear, masked_loss, normalise, positions_of
from memdlm.diffusion.losses import Nats
from memdlm.memory import OBJECTIVES, STRATEGIES, MemoryConfig, ParametricMemory
from memdlm.models import ModelDenoiser
from memdlm.models.blocks import chunked_loss
from memdlm.models.blocks.chunked_loss import values_in_chunks
from memdlm.models.networks.lower_layers import SharedLowerLayers
from memdlm.training import score
from rank_worker import batch_of
from tiny import CONFIGS, MASK, V, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, **options}
    return ParametricMemory(model, MemoryConfig(**options), mask_token_id=MASK)


def count_calls(blocks):
    calls = [0] * len(blocks)
    for index, block in enumerate(blocks):
        # Before the call: checkpointing leaves a block that it recomputes as soon as it has what it needs.
        def seen(module, inputs, index=index):
            calls[index] += 1

        block.register_forward_pre_hook(seen)
    return calls


def step(model, batch, memory=None, *, share=True, seed=0):
    """One training step's losses and gradients."""
    if memory is None:
        lost = score(model, batch, schedule=Linear(), weighting="scheduler")
        loss = normalise(lost.sums, lost.counts, "token").squeeze()
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with memory.write(batch.clean, batch.labels, batch.attention_mask, rng(seed), anchor=batch.noised) as written:
        lower_layers = memory.lower_layers if share else None
        lost = score(model, batch, schedule=Linear(), weighting="scheduler", lower_layers=lower_layers)
        loss = normalise(lost.sums, lost.counts, "token").squeeze()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return written.losses, loss.detach(), gradients


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_outer_loss_that_continues_from_the_write_has_the_same_gradients(family, checkpointing):
    results = []
    for share in (False, True):
        model = tiny(family, torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        results.append(step(model, batch_of(slice(None)), memory_of(model, per_sample=False), share=share))
    assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    assert len(results[0][2]) == len(list(tiny(family).parameters()))


@pytest.mark.parametrize(
    ("options", "lower", "upper"),
    [
        # (passes below the first fast weight; above it: each student and its recomputation, teachers, outer loss)
        ({}, 2, 5),
        ({"inner_gradient_checkpointing": False}, 2, 3),
        ({"num_inner_epochs": 3}, 2, 13),
        ({"num_inner_steps": 4}, 4, 9),
        ({"inner_loss_type": "distill"}, 3, 7),
        ({"masking_strategy": "pre_only", "inner_loss_type": "distill"}, 2, 4),
        ({"masking_strategy": "no_progressive"}, 1, 3),
        ({"masking_strategy": "progressive_memory"}, 3, 5),
    ],
    ids=str,
)
def test_each_state_passes_the_frozen_blocks_once(options, lower, upper):
    model = tiny("small")
    calls = count_calls(model.model.layers)
    step(model, batch_of(slice(None)), memory_of(model, per_sample=False, **options))
    assert calls[0] == lower
    # A hook on the block itself sees a recomputation only from inside the block, so count a module within it.
    inner = count_calls([model.model.layers[1].mlp])
    model.zero_grad()
    step(model, batch_of(slice(None)), memory_of(model, per_sample=False, **options))
    assert inner[0] == upper


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_write_with_the_shared_prefix_is_the_write_without(strategy, objective, monkeypatch):
    model, ids = tiny("lladamoe", torch.float64), random_ids(3, 11)
    values = []
    for first in (None, 0):
        memory = memory_of(model, masking_strategy=strategy, inner_loss_type=objective, num_inner_epochs=2)
        if first is not None:
            monkeypatch.setattr(memory, "first_block", first)  # no block lies below: nothing is shared
        with memory.write(ids, generator=rng(4)) as written:
            values.append([written.losses, *(value.clone() for value in memory.fast.tensors())])
    assert_close(values[0], values[1], rtol=1e-12, atol=1e-14)


def test_no_prefix_survives_its_block_and_padding_spared_by_the_write_alone_is_not_shared():
    model, batch = tiny("small"), batch_of(slice(None))
    memory = memory_of(model, per_sample=False, pad_unmask_mode="inner")
    is_padding = torch.zeros_like(batch.is_maskable)
    is_padding[2, 8:12] = True
    noised_padding = bool((batch.noised.is_masked & is_padding).any())
    assert noised_padding, "the case below needs a masked padding"
    calls = count_calls(model.model.layers)
    with memory.write(
        batch.clean, batch.labels, batch.attention_mask, rng(), anchor=batch.noised, is_padding=is_padding
    ):
        score(model, batch, schedule=Linear(), weighting="uniform", lower_layers=memory.lower_layers)
    assert calls[0] == 3, "two inner states, and the anchor, which is another text"
    assert memory.lower_layers is None


def test_another_mask_or_pattern_is_another_state():
    from memdlm.models import BlockCausal

    model, ids = tiny("small", torch.float64), random_ids(2, 8)
    lower_layers, positions = SharedLowerLayers(1), torch.tensor([3, 12])
    keep = torch.ones_like(ids)
    keep[1, 4:] = 0
    for mask in (None, keep):
        for pattern in (None, BlockCausal(2)):
            views = [
                ModelDenoiser(model, attention_mask=mask, attention_pattern=pattern, lower_layers=each)
                for each in (lower_layers, None)
            ]
            with torch.no_grad():
                assert_close(views[0].logits(ids, positions), views[1].logits(ids, positions))


@pytest.mark.parametrize("family", ["small", "lladamoe"])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("limit", [1, 3 * V, 10 * V])
def test_chunks_change_no_value_and_no_gradient(family, objective, limit, monkeypatch):
    results = []
    for size in (None, limit):
        if size is not None:
            monkeypatch.setattr(chunked_loss, "MAX_LOGITS", size)
            monkeypatch.setattr(chunked_loss, "MAX_CONSTANT_LOGITS", size)
        model = tiny(family, torch.float64).train()
        memory = memory_of(model, per_sample=False, inner_loss_type=objective, loss_weight_type="scheduler")
        written, loss, gradients = step(model, batch_of(slice(None)), memory)
        results.append([written, loss, *gradients.values()])
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-13)


def test_no_more_than_a_chunk_of_logits_exists_at_once(monkeypatch):
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 5 * V)
    monkeypatch.setattr(chunked_loss, "MAX_CONSTANT_LOGITS", 4 * V)
    model = tiny("small")
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    step(model, batch_of(slice(None)), memory_of(model, per_sample=False))
    assert max(seen) == 5
    assert len(seen) > 10


def test_a_constant_projection_is_projected_once_and_a_learned_one_again(monkeypatch):
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 4 * V)
    monkeypatch.setattr(chunked_loss, "MAX_CONSTANT_LOGITS", 4 * V)
    hidden = torch.randn(10, 8, generator=rng(), requires_grad=True)
    head, calls = nn.Linear(8, V), []
    head.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    targets = torch.randint(0, V, (10,), generator=rng(1))
    for is_constant, expected in ((True, [4, 4, 2]), (False, [4, 4, 2] * 2)):
        calls.clear()
        values_in_chunks(Nats(targets), hidden, head, V, is_constant=is_constant).sum().backward()
        assert sorted(calls) == sorted(expected)
    values = values_in_chunks(Nats(targets), hidden, head, V, is_constant=True)
    (gradient,) = torch.autograd.grad(values.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_second_derivative_passes_through_recomputed_chunks(monkeypatch):
    """Exact outer gradients differentiate the inner loop again: the chunked loss must not stand in the way."""
    hidden = torch.randn(6, 8, generator=rng(), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 8, generator=rng(2), dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (6,), generator=rng(1))
    second = []
    for limit in (10**9, 2 * V):
        monkeypatch.setattr(chunked_loss, "MAX_LOGITS", limit)
        values = values_in_chunks(Nats(targets), hidden, lambda h: h @ weight.T, V)
        (gradient,) = torch.autograd.grad(values.square().sum(), hidden, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), (hidden, weight)))
    assert_close(second[1], second[0])


def test_the_write_costs_what_the_mathematics_asks():
    """Counted floating-point operations of a training step against the sum of its parts."""
    model, batch = tiny("small"), batch_of(slice(None))
    layer, head = (_flops(lambda m=m, x=x: m(*x)) for m, x in _parts(model, batch))
    n_anchor = int(batch.noised.is_masked.sum())

    def total(call):
        counter = FlopCounterMode(display=False)
        with counter:
            call()
        return counter.get_total_flops()

    plain = total(lambda: step(model, batch))
    memory = memory_of(model, per_sample=False, inner_gradient_checkpointing=False)
    with memory.write(batch.clean, batch.labels, batch.attention_mask, rng(), anchor=batch.noised) as written:
        pass
    extra = total(lambda: step(model, batch, memory)) - plain
    n_pre = written.num_tokens - n_anchor
    # x_pre below; two students above, forward and backward (at most twice a forward); scored logits and their dX;
    # low-rank parts on top of the outer pass, which are small.
    lower, upper = layer, 2 * 3 * layer
    assert extra <= 1.15 * (lower + upper + 2 * head * (n_pre + n_anchor))


def _parts(model, batch):
    hidden = torch.randn(*batch.clean.shape, 32, generator=rng())
    rotary = model.model.rotary
    angles = rotary.angles(torch.arange(hidden.shape[1])[None], hidden)
    yield model.model.layers[0], (hidden, rotary, angles, None, None)
    yield model.lm_head, (hidden[0, :1],)


def _flops(call):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def test_a_masked_loss_reads_only_masked_positions():
    model, batch = tiny("small"), batch_of(slice(None))
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    masked_loss(ModelDenoiser(model), batch.clean, batch.noised, batch.is_maskable, schedule=Linear())
    assert seen == [(positions_of(batch.noised.is_masked).numel(), V)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_the_derivative_taken_on_the_spot_is_autograd_s(dtype, tolerance):
    weight = torch.randn(V, 8, generator=rng(2)).to(dtype)
    targets = torch.randint(0, V, (10,), generator=rng(1))
    results = []
    for is_constant in (False, True):
        hidden = torch.randn(10, 8, generator=rng()).to(dtype).requires_grad_()
        values = values_in_chunks(Nats(targets), hidden, lambda h: h @ weight.T, V, is_constant=is_constant)
        factors = torch.linspace(0.1, 2, 10, dtype=values.dtype)
        results.append((values, *torch.autograd.grad((values * factors).sum(), hidden)))
    assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
