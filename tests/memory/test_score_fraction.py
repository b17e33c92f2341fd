"""An inner loss estimated from a part of its positions: unbiased, drawn per row, and of a size that is known."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from memdlm.errors import ConfigError
from memdlm.memory import Anchor, MemoryConfig, ParametricMemory, TrajectoryStep, trajectory
from memdlm.memory.trajectory import sampled, scored_sets
from memdlm.models import ModelDenoiser
from memdlm.randomness import derive, uniform
from tiny import CONFIGS, MASK, PAD, families, inner_loss, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


def memory_of(model, **options):
    options = {
        **{"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, "inner_grad_clip": 0.0},
        **options,
    }
    return ParametricMemory(model, MemoryConfig(**options), mask_token_id=MASK)


def written(memory, ids, generator, mask=None, **arguments):
    with memory.write(ids, attention_mask=mask, generator=generator, **arguments) as record:
        return record, [value.detach().clone() for value in memory.fast.tensors()]


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.3, 0.5, 0.999, 1 / 3])
def test_every_row_keeps_its_rounded_up_share_of_what_is_scored(fraction):
    is_scored = torch.rand(40, 30, generator=rng()) < torch.linspace(0, 1, 40)[:, None]
    kept = sampled(is_scored, fraction, lambda: torch.rand(40, 30, generator=rng(1)))
    assert not (kept & ~is_scored).any()
    for row, counted in zip(is_scored, kept.sum(-1).tolist(), strict=True):
        scored = int(row.sum())
        assert counted == min(scored, max(1, math.ceil(fraction * scored - 1e-9)))


def test_every_scored_position_is_drawn_equally_often():
    is_scored = (torch.arange(12) % 2 == 0).expand(8000, -1)
    kept = sampled(is_scored, 0.5, lambda: torch.rand(8000, 12, generator=rng()))
    share = kept.double().mean(0)[::2]
    assert (share - 0.5).abs().max() < 4 * math.sqrt(0.25 / 8000)


def states(memory, ids, draw):
    anchor = Anchor(
        clean=ids,
        is_maskable=ids != PAD,
        is_masked=(ids != PAD) & (draw() < 0.5),
        t=torch.full((len(ids),), 0.5),
    )
    path = memory.strategy.path(anchor, draw)
    scored = scored_sets(path, "student_masked")
    return trajectory(path, anchor, mask_token_id=MASK, scored="student_masked"), scored


@families("sdar", "mdlm", "small", "small_windowed", "llada_switches")
@pytest.mark.parametrize("objective", ["ce", "distill", pytest.param("distill_reverse", marks=pytest.mark.slow)])
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_estimate_s_mean_is_the_whole_loss_and_the_whole_gradient(family, objective, per_sample):
    """For every norm (the network has no part in it), with rows that score different numbers of positions."""
    model, ids = tiny(family, torch.float64), random_ids(2, 9)
    ids[1, 6:] = PAD
    for norm in ("token", "sequence", "batch") if family == "small" else ("token",):
        options = {"inner_loss_type": objective, "loss_weight_type": "scheduler", "loss_norm_type": norm}
        memory = memory_of(model, per_sample=per_sample, inner_score_fraction=0.4, **options)
        steps, scored = states(memory, ids, lambda: torch.rand(2, 9, generator=rng(2)))
        memory.fast.reset(2 if per_sample else 1, rng(3))
        for index, value in enumerate(memory.fast.tensors()):
            # B is zero at reset, where distillation from itself and the gradient of A are zero too.
            noise = torch.randn(value.shape, generator=derive("phi", index), dtype=value.dtype) * 0.3
            memory.fast.replace([*memory.fast.tensors()[:index], value + noise, *memory.fast.tensors()[index + 1 :]])
        leaves = [value.detach().requires_grad_() for value in memory.fast.tensors()]
        memory.fast.replace(leaves)

        def found(step: TrajectoryStep, memory=memory, leaves=leaves):
            losses = inner_loss(memory, ModelDenoiser(model), step)
            gradients = torch.autograd.grad(losses.sum(), leaves)
            # Projections of the gradient: few numbers, all of which count.
            vectors = [torch.randn(g.shape, generator=derive("v", n), dtype=g.dtype) for n, g in enumerate(gradients)]
            along = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
            return torch.cat([losses.detach(), along[None]])

        with memory.fast.attached():
            whole = found(steps[0])
            draws = []
            for number in range(60):
                part = sampled(scored[0], 0.4, lambda n=number: uniform((2, 9), derive("part", n)))
                draws.append(found(dataclasses.replace(steps[0], is_sampled=part)))
        drawn = torch.stack(draws)
        error = drawn.std(0) / math.sqrt(len(drawn))
        assert (drawn.std(0) > 1e-6 * whole.abs()).all()
        assert ((drawn.mean(0) - whole).abs() < 4 * error).all()
        memory.fast.erase()


@every_family
def test_a_write_with_a_sample_is_a_function_of_its_generator(family):
    model, ids = tiny(family), random_ids(2, 20)
    memory = memory_of(model, inner_score_fraction=0.5)
    first, second, other = (written(memory, ids, rng(seed)) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first[1], second[1], strict=True))
    assert not all(a.equal(b) for a, b in zip(first[1], other[1], strict=True))
    whole = written(memory_of(model), ids, rng(1))
    assert first[0].num_tokens < 0.75 * whole[0].num_tokens
    assert not all(a.equal(b) for a, b in zip(first[1], whole[1], strict=True))


def test_the_default_draws_nothing_more():
    model, ids, generator = tiny("small"), random_ids(2, 20), rng(1)
    one, other = memory_of(model), memory_of(model, inner_score_fraction=1.0)
    before = written(one, ids, generator)
    state = generator.get_state()
    again = written(other, ids, generator.manual_seed(1))
    assert all(a.equal(b) for a, b in zip(before[1], again[1], strict=True))
    assert generator.get_state().equal(state)


@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2", "small"])
@pytest.mark.parametrize("strategy", ["pmc", "strided"])
def test_a_row_s_sample_owes_nothing_to_its_batch(family, strategy):
    model = tiny(family, torch.float64)
    memory = memory_of(model, inner_score_fraction=0.5, masking_strategy=strategy, per_sample=True)
    lengths, width = [9, 5, 12], 12
    keep = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = random_ids(3, width).masked_fill(~keep, PAD)
    record, together = written(memory, ids, [derive("row", row) for row in range(3)], keep)
    for row, length in enumerate(lengths):
        single, alone = written(memory, ids[row : row + 1, :length], [derive("row", row)])
        assert_close(record.losses[:, row], single.losses[:, 0], rtol=0, atol=1e-9)
        for several, one in zip(together, alone, strict=True):
            assert_close(several.select(-3, row), one.select(-3, 0), rtol=0, atol=1e-9)


def test_every_update_has_a_sample_of_its_own():
    model, ids = tiny("small", torch.float64), random_ids(1, 40)
    options = {"masking_strategy": "no_progressive", "num_inner_epochs": 4, "inner_lr": 1e-9}
    losses = written(memory_of(model, inner_score_fraction=0.3, **options), ids, rng())[0].losses
    assert len(losses.unique()) == 4
    assert_close(written(memory_of(model, **options), ids, rng())[0].losses.std(), torch.zeros(()).double())


def test_only_the_sample_reaches_the_vocabulary():
    model, ids, seen = tiny("small"), random_ids(2, 40), []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    whole = written(memory_of(model), ids, rng())[0]
    assert sum(seen) == whole.num_tokens
    seen.clear()
    part = written(memory_of(model, inner_score_fraction=0.25), ids, rng())[0]
    assert sum(seen) == part.num_tokens
    # Two states of two rows, each rounded up.
    assert 0.25 * whole.num_tokens <= part.num_tokens <= 0.25 * whole.num_tokens + 4


def test_a_chunk_that_scores_one_position_keeps_it():
    model, ids = tiny("small"), random_ids(1, 9)
    labels = ids.clone()
    labels[0, :8] = -100
    memory = memory_of(model, inner_score_fraction=0.1, chunk_length=3, prompt_mask_ratio=1.0)
    record, _ = written(memory, ids, rng(), labels=labels)
    assert record.num_tokens == 2
    assert record.losses.isfinite().all()


@pytest.mark.parametrize("family", ["llada", "llada2", "small"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_exact_gradient_follows_the_sample(family, per_sample):
    """The second pass of a step reads the positions of the first: central differences agree."""
    model, prompt, question = tiny(family, torch.float64), random_ids(2, 12), random_ids(2, 7, seed=1)
    config = MemoryConfig.recall(
        **{"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_lr": 0.7, "per_sample": per_sample, "strides": 3},
        inner_score_fraction=0.5,
    )
    memory = ParametricMemory(model, config, mask_token_id=MASK)

    def outer():
        with memory.write(prompt, generator=rng(3)):
            return model(question).logits.log_softmax(-1)[..., 5].mean()

    parameters = list(memory.learned.parameters())
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.add_(torch.randn(parameter.shape, generator=derive("shake", index), dtype=torch.float64) * 0.2)
    outer().backward()
    direction = [torch.randn(p.shape, generator=derive("d", i), dtype=p.dtype) for i, p in enumerate(parameters)]
    exact = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
    values, h = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(sign * h * along)
            values.append(outer())
    assert exact.abs() > 1e-6
    assert_close(exact, (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_score_fraction": 0.0}, "mem_inner_score_fraction must be greater than 0, got 0.0"),
        ({"inner_score_fraction": 1.5}, "mem_inner_score_fraction must be at most 1, got 1.5"),
        (
            {"inner_score_fraction": 0.5, "inner_loss_type": "distill_hidden"},
            "mem_inner_score_fraction=0.5 has no effect with mem_inner_loss_type='distill_hidden'",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**options)


def test_a_saved_memory_says_what_it_was_estimated_from(tmp_path):
    model = tiny("small")
    memory = memory_of(model, inner_score_fraction=0.5)
    with memory.write(random_ids(1, 20), generator=rng()):
        saved = memory.save(tmp_path / "doc.mem")
    assert saved.config.inner_score_fraction == 0.5
    assert memory_of(model).load(tmp_path / "doc.mem").config.inner_score_fraction == 0.5
