"""One update: what is clipped, what multiplies the rate, what is skipped; and which random numbers a write takes."""

import pytest
import torch
from torch.testing import assert_close

from memdlm.diffusion import Corrupted
from memdlm.memory import LocalSGD, MemoryConfig, ParametricMemory
from tiny import CONFIGS, MASK, predicted, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
SOUND = torch.tensor([True, True])


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, **options}
    # Chunks of any length, and losses that a plain call gives: SDAR's own writes are in blocks.
    return ParametricMemory(model, MemoryConfig(**{"attention": "full", **options}), mask_token_id=MASK)


def pair(seed):
    """One tensor of a linear layer [S, rows, columns] and one of experts [E, S, rows, columns]."""
    shapes = ((2, 3, 4), (5, 2, 3, 4))
    return [torch.randn(shape, generator=rng(seed + i), dtype=torch.float64) for i, shape in enumerate(shapes)]


def test_a_learned_factor_multiplies_the_learning_rate():
    values, gradients = pair(0), pair(2)
    update = LocalSGD(inner_lr=0.3, inner_grad_clip=0.0)
    plain = update.step(values, gradients, SOUND)
    for value, gradient, found in zip(values, gradients, plain, strict=True):
        assert_close(found, value - 0.3 * gradient)
    ones, twos = ([torch.tensor(number, dtype=torch.float64)] * 2 for number in (1.0, 2.0))
    assert_close(update.step(values, gradients, SOUND, ones), plain)
    assert_close(
        update.step(values, gradients, SOUND, twos),
        LocalSGD(inner_lr=0.6, inner_grad_clip=0.0).step(values, gradients, SOUND),
    )


@pytest.mark.parametrize("factors", [None, [torch.tensor(1.0, dtype=torch.float64)] * 2], ids=["plain", "learned"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_gradients_are_clipped_per_sample_and_unsound_samples_keep_their_values(scope, factors):
    values, gradients = pair(0), pair(2)
    gradients[0][1] *= 1e-3
    gradients[1][:, 1] *= 1e-3
    largest = 0.7
    update = LocalSGD(inner_lr=0.1, inner_grad_clip=largest, inner_clip_scope=scope)
    moved = [value - found for value, found in zip(values, update.step(values, gradients, SOUND, factors), strict=True)]
    norms = [gradient.flatten(-2).norm(dim=-1) for gradient in gradients]
    whole = (norms[0] ** 2 + (norms[1] ** 2).sum(0)).sqrt()
    for step, gradient, norm in zip(moved, gradients, norms, strict=True):
        scale = (largest / (whole.expand_as(norm) if scope == "global" else norm)).clamp(max=1)
        assert_close(step, 0.1 * gradient * scale[..., None, None], rtol=1e-9, atol=1e-12)
    kept = update.step(values, gradients, torch.tensor([False, True]), factors)
    for value, found, step in zip(values, kept, moved, strict=True):
        assert found.select(-3, 0).equal(value.select(-3, 0))
        assert_close(found.select(-3, 1), (value - step).select(-3, 1))


@every_family
def test_an_infinite_gradient_of_a_finite_loss_is_skipped_and_counted(family):
    model, ids = tiny(family), random_ids(2, 10)
    memory = memory_of(model, num_inner_steps=3, prompt_mask_ratio=0.5)
    updates, seen = [], []

    def poison(module, inputs, out):
        if not out.requires_grad:
            return None
        updates.append(1)
        if len(updates) == 2:
            out.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("inf")))
        return None

    class Watching(LocalSGD):
        def step(self, values, gradients, is_sound, factors=None):
            found = super().step(values, gradients, is_sound, factors)
            seen.append((is_sound.tolist(), values, found))
            return found

    memory.update = Watching(inner_lr=1.0)
    handle = memory._adapted[-1].register_forward_hook(poison)
    try:
        with memory.write(ids, generator=rng()) as written:
            values = memory.fast.tensors()
    finally:
        handle.remove()
    assert written.losses.isfinite().all()
    assert written.num_skipped.tolist() == [1, 0]
    assert [sound for sound, _, _ in seen] == [[True, True], [False, True], [True, True]]
    assert all(value.isfinite().all() for value in values)
    _, before, after = seen[1]
    assert all(b.select(-3, 0).equal(a.select(-3, 0)) for b, a in zip(before, after, strict=True))
    assert not all(b.select(-3, 1).equal(a.select(-3, 1)) for b, a in zip(before, after, strict=True))


def test_masks_of_a_row_do_not_depend_on_whether_it_comes_first():
    """Rows that share a memory draw their masks alike, although the first one's generator also draws the start."""
    generators = [rng(5), rng(5)]
    memory = memory_of(tiny("small"), per_sample=False)
    with memory.write(random_ids(2, 9), generator=generators):
        pass
    assert generators[0].get_state().equal(generators[1].get_state())
    assert not generators[0].get_state().equal(rng(5).get_state()), "the masks were drawn"


@every_family
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_one_memory_for_the_batch_follows_the_joined_objective(family, norm):
    """Rows that score different numbers of tokens: `token` is the mean over all of them, not a mean of means."""
    model, ids = tiny(family, torch.float64), random_ids(2, 10)
    is_masked = torch.zeros_like(ids, dtype=torch.bool)
    is_masked[0, 2:9], is_masked[1, 4:6] = True, True
    noised = Corrupted(ids.masked_fill(is_masked, MASK), is_masked, torch.tensor([0.7, 0.2]))
    with torch.no_grad():
        logits = predicted(model, noised.ids)
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * is_masked
    counts = is_masked.sum(1)
    expected = {
        "token": nats.sum() / counts.sum(),
        "sequence": (nats.sum(1) / counts).mean(),
        "batch": nats.sum() / 2,
    }
    assert (expected["token"] - expected["sequence"]).abs() > 1e-2, "otherwise the two could be mistaken"
    memory = memory_of(model, per_sample=False, masking_strategy="no_progressive", loss_norm_type=norm)
    with memory.write(ids, generator=rng(), anchor=noised) as written:
        assert memory.fast.num_samples == 1
    assert written.losses.shape == (1,)
    assert_close(written.losses[0], expected[norm])


@every_family
def test_epochs_go_on_from_where_the_last_one_ended(family):
    model, ids = tiny(family, torch.float64), random_ids(1, 10)
    options = {"masking_strategy": "strided", "num_inner_steps": 2}
    with memory_of(model, **options).write(ids, generator=rng()) as once:
        pass
    with memory_of(model, **options, num_inner_epochs=3).write(ids, generator=rng()) as often:
        pass
    assert often.losses.shape == (6, 1)
    assert often.num_tokens == 3 * once.num_tokens
    assert_close(often.losses[:2], once.losses)
    assert not torch.allclose(often.losses[2:4], once.losses)
