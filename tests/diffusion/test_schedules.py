"""Laws of every schedule, and the published values."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from goldens import ROOT, folders, read_json
from memdlm.diffusion import SCHEDULES, Truncated, dream_counts, make_schedule, reveal_counts
from memdlm.errors import ConfigError

TABLES = ROOT / "tables.json"
every_schedule = pytest.mark.parametrize("name", sorted(SCHEDULES))


@every_schedule
def test_everything_is_clean_at_0_and_masked_at_1(name):
    ends = make_schedule(name).alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)


@every_schedule
def test_alpha_falls_and_its_derivative_is_the_automatic_one(name):
    schedule = make_schedule(name)
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    assert (alpha.diff() < 0).all()
    (automatic,) = torch.autograd.grad(alpha.sum(), t)
    assert_close(schedule.alpha_derivative(t.detach()), automatic)


@every_schedule
def test_weight_times_masking_probability_is_the_slope(name):
    schedule, t = make_schedule(name), torch.linspace(0.01, 1, 50, dtype=torch.float64)
    assert_close(schedule.loss_weight(t) * (1 - schedule.alpha(t) + 1e-6), -schedule.alpha_derivative(t))


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.5), (-0.1, 0.5), (0.2, 1.1), (0.9, 0.1)])
def test_a_reveal_needs_two_times_in_order(s, t):
    with pytest.raises(ConfigError, match="0 <= s < t <= 1"):
        make_schedule("linear").stay_masked(s, t)


def test_an_unknown_schedule_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'linaer'.*Possible: linear, cosine.*Did you mean 'linear'"):
        make_schedule("linaer")


@pytest.mark.golden
@every_schedule
def test_published_values(name):
    table = json.loads(TABLES.read_text())
    schedule = make_schedule(name)
    for key, method, tolerance in (("weight", schedule.loss_weight, 1e-5), ("alpha", schedule.alpha, 1e-6)):
        for t, expected in table[key][name].items():
            assert_close(method(torch.tensor(float(t))).item(), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.golden
def test_published_reveal_counts():
    table = json.loads(TABLES.read_text())["transfer"]
    assert table
    for key, expected in table.items():
        name, masked, steps = key.split("/")
        counts = reveal_counts(torch.tensor([int(masked)]), int(steps), schedule=make_schedule(name))
        assert counts[0].tolist() == expected, key


@given(
    masks=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    steps=st.integers(1, 40),
    name=st.sampled_from(sorted(SCHEDULES)),
    seed=st.none() | st.integers(0, 999),
)
def test_every_row_reveals_exactly_its_masks_and_no_step_is_idle(masks, steps, name, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    counts = reveal_counts(torch.tensor(masks), steps, schedule=make_schedule(name), generator=generator)
    assert counts.sum(1).tolist() == masks
    assert counts.shape[1] <= steps
    assert (counts >= 0).all()
    for row in counts:
        used = int((row > 0).sum())
        assert (row[:used] > 0).all(), "zeros stand behind"
    if counts.shape[1]:
        assert (counts > 0).any(0).all()


@pytest.mark.golden
@pytest.mark.parametrize("family", folders("schedule.json"))
def test_published_counts_of_dream(family):
    rows = read_json(family, "schedule.json")["rows"]
    assert rows
    for key, expected in rows.items():
        masked, steps, eps = key.split("/")
        counts = dream_counts(torch.tensor([int(masked)]), int(steps), eps=float(eps))
        assert counts[0].tolist() == expected, key


@given(
    masks=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    steps=st.integers(1, 40),
    eps=st.sampled_from([1e-3, 0.1, 0.5]),
    seed=st.none() | st.integers(0, 999),
)
def test_dream_reveals_every_mask_of_every_row_and_needs_no_idle_step(masks, steps, eps, seed):
    def drawn():
        return None if seed is None else [torch.Generator().manual_seed(seed + i) for i in range(len(masks))]

    counts = dream_counts(torch.tensor(masks), steps, eps=eps, generator=drawn())
    assert counts.sum(1).tolist() == masks
    assert counts.shape == (len(masks), steps)
    assert (counts >= 0).all()
    alone = [
        dream_counts(torch.tensor([n]), steps, eps=eps, generator=None if seed is None else [each])
        for n, each in zip(masks, drawn() or [None] * len(masks), strict=True)
    ]
    assert counts.equal(torch.cat(alone)), "the published code takes the mean over the batch"
    short = Truncated(steps=steps, eps=eps, is_stochastic=seed is not None).quotas(torch.tensor(masks), drawn())
    for row, brief in zip(counts.tolist(), short.tolist(), strict=True):
        assert [n for n in row if n] == [n for n in brief if n]
    assert (short > 0).any(0).all()


def test_drawn_counts_commit_each_position_with_the_probability_of_its_step():
    """Dream's `origin`: every masked position is committed with probability 1 - t_{i+1} / t_i, on its own."""
    steps, eps, masked, rows = 4, 0.1, 6, 20000
    counts = dream_counts(
        torch.full((rows,), masked), steps, eps=eps, generator=torch.Generator().manual_seed(0)
    ).double()
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64)
    stays = times / times[0]
    expected = masked * torch.cat((stays[:-2] - stays[1:-1], stays[-2:-1]))
    assert_close(counts.mean(0), expected, atol=0.03, rtol=0)
    assert (counts == 0).any(), "a step may be empty"


def test_no_steps_of_dream_are_refused():
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        dream_counts(torch.tensor([3]), 0, eps=1e-3)


def test_rows_do_not_depend_on_each_other():
    together = reveal_counts(torch.tensor([10, 7, 0]), 4, schedule=make_schedule("linear"))
    assert together.tolist() == [[2, 3, 2, 3], [2, 2, 2, 1], [0, 0, 0, 0]]


def test_no_steps_is_refused():
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        reveal_counts(torch.tensor([3]), 0, schedule=make_schedule("linear"))
