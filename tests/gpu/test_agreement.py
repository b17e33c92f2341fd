"""A device gives what the CPU gives: predictions, writes, the draws of a write, the exact gradient."""

import pytest
import torch
from torch.testing import assert_close

from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models.blocks import experts
from memdlm.randomness import derive, uniform
from tiny import CONFIGS, MASK, random_ids, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
mixtures = pytest.mark.parametrize("family", ["lladamoe", "llada2"])
IDS, QUESTION = random_ids(2, 16), random_ids(2, 7, seed=1)


def memory_of(model, preset=MemoryConfig, **options):
    options = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, **options}
    return ParametricMemory(model, preset(**options), mask_token_id=MASK)


def rows_of(count):
    return [derive("row", row) for row in range(count)]


def agree(found, expected):
    """Errors count by the largest number: sums of another order differ in their last bits."""
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.cpu(), theirs, rtol=0, atol=2e-4 * max(1e-6, theirs.abs().max().item()))


def error(found, exact):
    return ((found.float().cpu() - exact).norm() / exact.norm()).item()


def on_both(device, run, *arguments):
    return run(device, *arguments), run(torch.device("cpu"), *arguments)


# Predictions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predicted(device, family, dtype):
    model = tiny(family, dtype).to(device)
    mask = torch.ones_like(IDS)
    mask[1, 12:] = 0
    ids, mask = IDS.to(device), mask.to(device)
    return [model(ids).logits, model(ids, attention_mask=mask).logits[:, :12]]


@every_family
def test_predictions_in_float32(family, device):
    agree(*on_both(device, predicted, family, torch.float32))


@every_family
def test_predictions_in_bfloat16_are_no_worse_than_the_cpus(family, device):
    """In bfloat16 devices round differently, and a router may choose differently: both are held against float32."""
    exact = predicted(torch.device("cpu"), family, torch.float32)
    for found, theirs, truth in zip(*on_both(device, predicted, family, torch.bfloat16), exact, strict=True):
        assert found.isfinite().all()
        assert error(found, truth) <= 2 * error(theirs, truth) + 5e-3


# Draws ------------------------------------------------------------------------------------------------------------


def drawn(device, family):
    memory = memory_of(tiny(family).to(device), inner_dropout=0.5)
    memory.fast.reset(2, rows_of(2), dropout=memory.config.inner_dropout)
    found = list(memory.fast.named().values())
    for update in range(2):
        with memory.fast.dropping(update):
            found += [memory.fast.input_factors(site.path, 9, found[0].new_empty(1, 24)) for site in memory.fast.sites]
    return [uniform((3, 1000), derive("numbers"), device, torch.float64), *found]


@every_family
def test_a_seed_gives_the_same_start_and_zeros(family, device):
    """Bit for bit: integer arithmetic decides."""
    for ours, theirs in zip(*on_both(device, drawn, family), strict=True):
        assert ours.device.type == device.type
        assert ours.cpu().equal(theirs)


# Writes -----------------------------------------------------------------------------------------------------------


def written(device, family, options, rows=2):
    model = tiny(family).to(device)
    memory = memory_of(model, **options)
    ids = random_ids(rows, 16).to(device)
    with memory.write(ids, generator=rows_of(rows)) as found, torch.no_grad():
        return [found.losses, found.grad_norms, *memory.fast.named().values(), model(ids).logits]


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_sample": False},
        {"inner_dropout": 0.5},
        {"inner_loss_type": "distill"},
        {"masking_strategy": "progressive_memory"},
        {"inner_adapter_type": "full", "inner_rank": 32, "inner_alpha": 64.0},
        {"inner_gradient_checkpointing": False, "inner_clip_scope": "global"},
    ],
    ids=str,
)
def test_writes(family, options, device):
    agree(*on_both(device, written, family, options))


@mixtures
def test_writes_of_more_groups_than_one_product_takes(family, device):
    rows = experts.MAX_GROUPS // CONFIGS[family]().num_experts + 1
    agree(*on_both(device, written, family, {}, rows))


@every_family
@pytest.mark.parametrize("per_sample", [True, False])
def test_writes_in_bfloat16_are_no_worse_than_the_cpus(family, per_sample, device):
    def losses(place, dtype):
        memory = memory_of(tiny(family, dtype).to(place), per_sample=per_sample)
        with memory.write(IDS.to(place), generator=rows_of(2)) as found:
            return found.losses

    cpu = torch.device("cpu")
    exact, theirs, ours = losses(cpu, torch.float32), losses(cpu, torch.bfloat16), losses(device, torch.bfloat16)
    assert error(ours, exact) <= 3 * error(theirs, exact) + 2e-2


# The exact gradient -----------------------------------------------------------------------------------------------


def directional(device, family):
    """Return the derivative of an outer loss along a random direction: by the backward pass, and by differences."""
    memory = memory_of(
        tiny(family, torch.float64).to(device), MemoryConfig.recall, inner_target_modules="up_proj,down_proj", strides=3
    )
    parameters = [*memory.model.parameters(), *memory.learned.parameters()]
    direction = [
        torch.randn(p.shape, generator=derive("d", i), dtype=p.dtype).to(device) for i, p in enumerate(parameters)
    ]

    def loss():
        with memory.write(IDS.to(device), generator=rows_of(2)):
            return memory.model(QUESTION.to(device)).logits.log_softmax(-1)[..., 5].mean()

    size, h, values = sum(d.square().sum() for d in direction).sqrt(), 1e-6, []
    with torch.no_grad():
        for index, parameter in enumerate(memory.learned.parameters()):
            parameter.add_(
                torch.randn(parameter.shape, generator=derive("s", index), dtype=parameter.dtype).to(device) / 5
            )
    loss().backward()
    exact = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True) if p.grad is not None) / size
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, step in zip(parameters, direction, strict=True):
                parameter.add_(sign * h / size * step)
            values.append(loss())
    return exact, (values[0] - values[1]) / (2 * h)


@every_family
def test_the_exact_gradient_is_that_of_finite_differences(family, device):
    exact, differences = directional(device, family)
    assert exact.abs() > 1e-5
    assert_close(exact, differences, rtol=1e-5, atol=0)
