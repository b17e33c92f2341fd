"""The masked loss against a loop over positions, for every schedule, weighting and normalisation."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from memdlm.diffusion import (
    NORMS,
    SCHEDULES,
    WEIGHTINGS,
    Planner,
    corrupt,
    draw_times,
    make_schedule,
    maskable_positions,
    masked_loss,
    normalise,
    positions_of,
    row_sums,
)
from memdlm.errors import ConfigError
from memdlm.types import Denoise

V, MASK = 11, 10


class Table(Denoise):
    """Logits are a fixed function of the ids: a table of token and left neighbour, plus one of the column."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(5)
        self.table = torch.randn(V, V, V, generator=generator, dtype=dtype)
        self.column = torch.randn(40, V, generator=generator, dtype=dtype) / 10

    def everywhere(self, ids):
        return self.table[ids, ids.roll(1, dims=1)] + self.column[: ids.shape[1]]

    def logits(self, ids, positions):
        return self.everywhere(ids).flatten(0, 1)[positions]

    def hidden(self, ids, positions):
        return self.logits(ids, positions)


def noised_batch(seed, schedule, rows=3, length=13):
    g = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, MASK, (rows, length), generator=g)
    labels = torch.where(torch.rand(clean.shape, generator=g) < 0.3, -100, clean)
    t = draw_times(torch.rand(rows, generator=g, dtype=torch.float64), 1e-3)
    is_maskable = maskable_positions(labels)
    noised = corrupt(clean, is_maskable, t, torch.rand(clean.shape, generator=g), schedule=schedule, mask_token_id=MASK)
    return clean, is_maskable, noised


@pytest.mark.parametrize(
    ("name", "weighting", "norm"), list(itertools.product(sorted(SCHEDULES), sorted(WEIGHTINGS), NORMS))
)
def test_loss_equals_a_loop_over_positions(name, weighting, norm):
    schedule, denoise = make_schedule(name), Table()
    clean, is_maskable, noised = noised_batch(1, schedule)
    lost = masked_loss(denoise, clean, noised, is_maskable, schedule=schedule, weighting=weighting)
    ours = normalise(lost.sums, lost.counts, norm).item()

    logits = denoise.everywhere(noised.ids)
    rows = []
    for b in range(clean.shape[0]):
        t = noised.t[b]
        by_name = {"scheduler": schedule.loss_weight(t), "uniform": 1.0, "inverse": 1 / (1 - schedule.alpha(t))}
        weight = float(by_name[weighting])
        total = 0.0
        for i in range(clean.shape[1]):
            if noised.is_masked[b, i]:
                total -= weight * logits[b, i].log_softmax(-1)[clean[b, i]].item()
        rows.append((total, int(is_maskable[b].sum())))
    expected = {
        "token": sum(r for r, _ in rows) / sum(c for _, c in rows),
        "sequence": sum(r / c for r, c in rows) / len(rows),
        "batch": sum(r for r, _ in rows) / len(rows),
    }[norm]
    assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@given(
    sums=st.lists(st.floats(-5, 5), min_size=4, max_size=4), counts=st.lists(st.integers(1, 9), min_size=4, max_size=4)
)
def test_parts_of_a_batch_add_up_to_the_whole(norm, sums, counts):
    sums, counts = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts)
    whole = normalise(sums, counts, norm)
    totals = {"total_tokens": counts.sum(), "total_rows": 4}
    parts = normalise(sums[:1], counts[:1], norm, **totals) + normalise(sums[1:], counts[1:], norm, **totals)
    assert_close(parts, whole)


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_s_loss_is_that_of_its_own_rows(norm):
    sums, counts = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2, 3, 4, 5])
    together = normalise(sums, counts, norm, samples=2)
    alone = [normalise(sums[i : i + 2], counts[i : i + 2], norm) for i in (0, 2)]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_counted_is_zero_not_nan(norm):
    assert normalise(torch.zeros(2), torch.zeros(2, dtype=torch.int64), norm).item() == 0


def test_unknown_names_list_the_choices():
    with pytest.raises(ConfigError, match=r"loss_norm_type: 'tokens'.*token, sequence, batch.*Did you mean 'token'"):
        normalise(torch.ones(1), torch.ones(1), "tokens")
    clean, is_maskable, noised = noised_batch(1, make_schedule("linear"))
    with pytest.raises(ConfigError, match="loss_weight_type: 'flat'"):
        masked_loss(Table(), clean, noised, is_maskable, schedule=make_schedule("linear"), weighting="flat")


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_weighted_loss_is_unbiased_in_t(name):
    """For a model that ignores the noise, the mean over t is the cross-entropy per token (up to epsilon)."""

    class Blind(Table):
        def everywhere(self, ids):
            return torch.zeros(*ids.shape, V, dtype=torch.float64)

    schedule, rows = make_schedule(name), 4000
    g = torch.Generator().manual_seed(3)
    clean = torch.zeros(rows, 8, dtype=torch.int64)
    t = draw_times((torch.arange(rows, dtype=torch.float64) + 0.5) / rows, 1e-3)
    is_maskable = torch.ones_like(clean, dtype=torch.bool)
    noised = corrupt(clean, is_maskable, t, torch.rand(clean.shape, generator=g), schedule=schedule, mask_token_id=MASK)
    lost = masked_loss(Blind(), clean, noised, is_maskable, schedule=schedule)
    per_token = lost.bound.sum() / lost.counts.sum()
    assert abs(per_token.item() / torch.log(torch.tensor(float(V))).item() - 1) < 0.05


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), length=st.integers(1, 20))
def test_corruption_only_touches_maskable_tokens(seed, rows, length):
    schedule = make_schedule("linear")
    clean, is_maskable, noised = noised_batch(seed, schedule, rows, length)
    assert (noised.is_masked <= is_maskable).all()
    assert (noised.ids == MASK).equal(noised.is_masked)
    assert noised.ids[~noised.is_masked].equal(clean[~noised.is_masked])


def test_row_sums_put_every_value_in_its_row():
    is_chosen = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    sums = row_sums(torch.tensor([1.0, 2.0, 4.0]), positions_of(is_chosen), is_chosen.shape)
    assert sums.tolist() == [3.0, 0.0, 4.0]


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -1.0])
def test_times_need_an_epsilon_inside_the_unit_interval(epsilon):
    with pytest.raises(ConfigError, match="time_epsilon"):
        draw_times(torch.rand(2), epsilon)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_the_planner_counts_the_surest_tokens_more(temperature):
    schedule, denoise = make_schedule("linear"), Table()
    clean, is_maskable, noised = noised_batch(4, schedule)
    planner = Planner(weight=2.0, temperature=temperature)
    plain = masked_loss(denoise, clean, noised, is_maskable, schedule=schedule)
    planned = masked_loss(denoise, clean, noised, is_maskable, schedule=schedule, planner=planner)
    assert_close(planned.bound, plain.bound)
    for row in range(clean.shape[0]):
        places = noised.is_masked[row].nonzero().flatten()
        nats = torch.stack([-denoise.everywhere(noised.ids)[row, i].log_softmax(-1)[clean[row, i]] for i in places])
        shares = torch.exp(-nats / temperature) / torch.exp(-nats / temperature).sum()
        expected = (nats * (1 + 2.0 * shares)).sum() * schedule.loss_weight(noised.t[row])
        assert_close(planned.sums[row], expected)


def test_no_gradient_reaches_the_planner():
    nats = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 2, 5])
    factors = Planner(weight=3.0).factors(nats, positions, torch.Size((2, 3)))
    assert not factors.requires_grad
    assert_close(factors[:2].sum(), torch.tensor(2.0 + 3.0, dtype=torch.float64))
    assert_close(factors[2], torch.tensor(1.0 + 3.0, dtype=torch.float64))
    assert factors[0] > factors[1]
