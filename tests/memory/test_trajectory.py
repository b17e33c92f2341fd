"""Laws of the states a write follows, for every strategy."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goldens import ROOT
from memdlm.memory import STRATEGIES, Anchor, MemoryConfig, ParametricMemory, trajectory
from memdlm.memory.trajectory import drawn, pre_anchor_counts
from memdlm.memory.writer import anchor_of as anchor_at
from tiny import tiny

MASK = 99


def anchor_of(seed, rows, length):
    g = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 90, (rows, length), generator=g)
    is_maskable = torch.rand(rows, length, generator=g) < 0.7
    t = torch.rand(rows, generator=g)
    is_masked = is_maskable & (torch.rand(rows, length, generator=g) < t[:, None])
    return Anchor(clean=clean, is_maskable=is_maskable, is_masked=is_masked, t=t)


def steps_of(config, anchor, seed=0, scored=None):
    g = torch.Generator().manual_seed(seed)
    path = config.strategy().path(anchor, lambda: torch.rand(anchor.clean.shape, generator=g))
    return trajectory(path, anchor, mask_token_id=MASK, scored=scored or config.inner_loss_mask_mode)


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"strided"}))
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), length=st.integers(1, 40), steps=st.integers(1, 4))
def test_every_state_masks_maskable_tokens_and_states_are_nested(strategy, seed, rows, length, steps):
    options = {"num_inner_steps": steps} if strategy.startswith(("pmc", "progressive")) else {}
    anchor = anchor_of(seed, rows, length)
    states = steps_of(MemoryConfig(masking_strategy=strategy, **options), anchor, seed)
    assert len(states) == (steps if options else 1)
    for state in states:
        assert (state.is_masked <= anchor.is_maskable).all()
        assert (state.ids == MASK).equal(state.is_masked)
        assert state.ids[~state.is_masked].equal(anchor.clean[~state.is_masked])
        assert state.is_scored.equal(state.is_masked)
    for noisier, cleaner in itertools.pairwise(states):
        assert (cleaner.is_masked <= noisier.is_masked).all()
        assert noisier.next_ids.equal(cleaner.ids)


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    length=st.integers(1, 40),
    strides=st.integers(2, 5),
    steps=st.integers(1, 7),
)
def test_strided_views_hide_every_token_once_with_its_neighbours_in_sight(seed, rows, length, strides, steps):
    anchor = anchor_of(seed, rows, length)
    states = steps_of(MemoryConfig(masking_strategy="strided", strides=strides, num_inner_steps=steps), anchor, seed)
    assert len(states) == steps
    once = states[: min(steps, strides)]
    views = torch.cat([state.is_masked.unflatten(0, (rows, -1)) for state in once], dim=1)
    assert views.shape[1] == strides
    assert views.sum(1).equal(anchor.is_maskable.long())
    for near in range(1, strides):
        assert not (views[..., near:] & views[..., :-near]).any()
    for state in states:
        clean = anchor.clean.repeat_interleave(len(state.ids) // rows, 0)
        assert state.clean.equal(clean)
        assert state.ids.equal(clean.masked_fill(state.is_masked, MASK))
        assert state.is_scored.equal(state.is_masked)
        assert len(state.t) == len(state.ids)
    if steps > strides:
        assert states[strides].is_masked.equal(states[0].is_masked), "begins again"


def test_where_the_stride_begins_is_random():
    anchor = anchor_of(0, 1, 12)
    config = MemoryConfig(masking_strategy="strided", strides=3, num_inner_steps=1)
    firsts = {steps_of(config, anchor, seed)[0].is_masked[0].nonzero()[0].item() for seed in range(40)}
    assert len(firsts) > 1


@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1.0, 1.15, 1.5, 2.0, 3.7]),
    length=st.integers(1, 60),
    steps=st.integers(2, 4),
)
def test_pmc_runs_from_the_pre_anchor_to_exactly_the_anchor(seed, scale, length, steps):
    anchor = anchor_of(seed, 3, length)
    states = steps_of(MemoryConfig(num_inner_steps=steps, progressive_consistent_start_scale=scale), anchor, seed)
    assert states[-1].is_masked.equal(anchor.is_masked)
    assert states[-1].next_ids.equal(anchor.clean)
    for row in range(3):
        k, n = int(anchor.is_masked[row].sum()), int(anchor.is_maskable[row].sum())
        sizes = [int(state.is_masked[row].sum()) for state in states]
        expected = [min(n, max(k, (k * round(scale * 100)) // 100))]
        for left in range(steps - 1, 0, -1):
            expected.append(expected[-1] - math.ceil((expected[-1] - k) / left))
        assert sizes == expected
        assert all(
            math.isclose(float(state.t[row]), size / max(n, 1), rel_tol=1e-6)
            for state, size in zip(states, sizes, strict=True)
        )


def test_a_row_s_states_do_not_depend_on_the_other_rows():
    anchor = anchor_of(5, 3, 30)
    u = torch.rand(3, 30, generator=torch.Generator().manual_seed(1))
    strategy = MemoryConfig(num_inner_steps=3).strategy()
    together = strategy.path(anchor, lambda: u)
    for row in range(3):
        part = slice(row, row + 1)
        alone = Anchor(
            clean=anchor.clean[part],
            is_maskable=anchor.is_maskable[part],
            is_masked=anchor.is_masked[part],
            t=anchor.t[part],
        )
        path = strategy.path(alone, lambda part=part: u[part])
        assert all(a[part].equal(b) for a, b in zip(together.masked, path.masked, strict=True))


def test_added_positions_are_uniform():
    is_maskable = torch.ones(1, 6, dtype=torch.bool)
    is_masked = torch.tensor([[True, False, False, False, False, True]])
    anchor = Anchor(clean=torch.zeros(1, 6).long(), is_maskable=is_maskable, is_masked=is_masked, t=torch.ones(1))
    counts = torch.zeros(6)
    for seed in range(2000):
        counts += steps_of(MemoryConfig(), anchor, seed)[0].is_masked[0]
    assert counts[[0, 5]].tolist() == [2000, 2000]
    assert (counts[1:5] / 2000 - 0.25).abs().max() < 0.05


@given(seed=st.integers(0, 10**6))
def test_newly_revealed_scores_what_the_next_state_shows(seed):
    anchor = anchor_of(seed, 2, 25)
    states = steps_of(MemoryConfig(num_inner_steps=3), anchor, seed, scored="newly_revealed")
    for state, following in itertools.pairwise(states):
        assert state.is_scored.equal(state.is_masked & ~following.is_masked)
    assert states[-1].is_scored.equal(states[-1].is_masked)


@pytest.mark.golden
def test_pre_anchor_counts_equal_the_published_up_to_float32_truncation():
    table = json.loads((ROOT / "tables.json").read_text())
    differs = {
        (s, n, k): (published, exact) for s, n, k, published, exact in table["pmc_count_differs_from_exact_floor"]
    }
    seen = 0
    for row in table["pmc_count"]:
        scale, total = row["scale"], row["total"]
        ours = pre_anchor_counts(torch.arange(total + 1), torch.full((total + 1,), total), scale).tolist()
        for k, (mine, published) in enumerate(zip(ours, row["target_by_k"], strict=True)):
            if (scale, total, k) in differs:
                assert (published, mine) == differs[scale, total, k]
                seen += 1
            else:
                assert mine == published, (scale, total, k)
    assert seen, "the table holds no truncated case: the comparison above is then complete"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@given(seed=st.integers(0, 10**6), length=st.integers(1, 4), steps=st.integers(1, 4))
def test_a_write_of_a_short_text_hides_some_of_it_in_every_state(strategy, seed, length, steps):
    """Each of up to four tokens is drawn with probability 0.2, so often none is; published code then learns nothing."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(3, length, generator=g)
    clean, is_maskable = torch.zeros(3, length, dtype=torch.int64), draw() < 0.7
    options = {"num_inner_steps": steps} if strategy.startswith(("pmc", "progressive")) else {}
    anchor = anchor_at(clean, is_maskable, None, draw, 0.2)
    path = MemoryConfig(masking_strategy=strategy, **options).strategy().path(anchor, draw)
    hidden = [each.unflatten(0, (3, -1)).any(1) for each in path.masked]
    if strategy == "strided":
        assert torch.stack(hidden).any(0).equal(is_maskable)
    else:
        assert all(each.any(-1).equal(is_maskable.any(-1)) for each in hidden)
    assert all((each <= is_maskable).all() for each in hidden)


def test_what_is_drawn_is_drawn_with_its_probability_and_else_one_token_is():
    uniform = torch.tensor([[0.1, 0.5, 0.15], [0.9, 0.3, 0.8], [0.1, 0.3, 0.8], [0.1, 0.3, 0.8]])
    is_maskable = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()
    expected = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    assert drawn(is_maskable, uniform, 0.2).equal(expected)


def test_a_write_that_scores_nothing_says_so(caplog):
    """The one that is left: what `pre_only` reveals of a short text is nothing, and only that counts."""
    options = {"inner_layer_fraction": 0.5, "inner_rank": 2, "masking_strategy": "pre_only"}
    for mode, is_learned in (("newly_revealed", False), ("student_masked", True)):
        caplog.clear()
        memory = ParametricMemory(tiny("small"), MemoryConfig(**options, inner_loss_mask_mode=mode), mask_token_id=31)
        with memory.write(torch.tensor([[5]]), generator=torch.Generator().manual_seed(0)) as written:
            assert (written.num_tokens > 0) is is_learned
        assert ("mem_inner_loss_mask_mode=newly_revealed. Set" in caplog.text) is not is_learned
