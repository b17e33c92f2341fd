"""Laws of the reverse loop, for every commit rule; likelihood against known answers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import MASK, Table, V
from torch.testing import assert_close

from memdlm.diffusion import (
    CONFIDENCES,
    Above,
    AtLeast,
    ClassifierFree,
    Confidence,
    Edit,
    Factor,
    LowConfidence,
    Scheduled,
    TokenSampler,
    absolute_blocks,
    blocks_after_prompt,
    denoise_canvas,
    is_greedy,
    make_confidence,
    monte_carlo_nll,
    positions_of,
)
from memdlm.errors import ConfigError, DataError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def canvas_of(prompts, new):
    length = max(prompts) + new
    column = torch.arange(length)
    starts = torch.tensor(prompts)[:, None]
    is_open = (column >= starts) & (column < starts + new)
    ids = torch.randint(0, MASK, (len(prompts), length), generator=rng(4))
    return ids.masked_fill(is_open, MASK), is_open


@pytest.mark.parametrize("commit", sorted(CONFIDENCES))
@settings(max_examples=30)
@given(
    prompts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    new=st.integers(1, 9),
    block=st.integers(1, 9),
    steps=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_a_canvas_is_filled_completely_and_only_where_it_is_open(commit, prompts, new, block, steps, temperature):
    ids, is_open = canvas_of(prompts, new)
    blocks = blocks_after_prompt(torch.tensor(prompts), ids.shape[1], new, block)
    rule = TokenSampler(mask_token_id=MASK, remasking=make_confidence(commit), temperature=temperature)
    seen = torch.zeros_like(is_open)
    final = ids
    for step in denoise_canvas(Table(), ids, is_open, blocks, steps_per_block=steps, sampler=rule, generator=rng()):
        assert not (seen & step.is_new).any(), "a position is committed once"
        assert step.is_new.any()
        seen |= step.is_new
        final = step.ids
    assert seen.equal(is_open)
    assert final[~is_open].equal(ids[~is_open])
    assert not (final[is_open] == MASK).any(), "the mask token is never predicted"


def test_blocks_are_filled_in_order_and_cover_the_response():
    lengths = torch.tensor([2, 5])
    blocks = blocks_after_prompt(lengths, 12, 7, 3)
    assert [b.sum(1).tolist() for b in blocks] == [[3, 3], [3, 3], [1, 1]]
    assert torch.stack(blocks).sum(0).max() == 1
    whole = absolute_blocks(2, 12, 5, torch.device("cpu"))
    assert torch.stack(whole).sum(0).eq(1).all()


def test_suppressed_tokens_never_appear_and_postponed_ones_come_last():
    ids, is_open = canvas_of([3], 8)
    rule = TokenSampler(mask_token_id=MASK, suppress=tuple(range(1, V - 1)))
    steps = list(denoise_canvas(Table(), ids, is_open, [is_open], steps_per_block=4, sampler=rule))
    assert (steps[-1].ids[is_open] == 0).all()


def test_most_confident_positions_are_committed_first():
    ids, is_open = canvas_of([3, 1], 6)
    first = next(
        iter(
            denoise_canvas(
                Table(), ids, is_open, [is_open], steps_per_block=3, sampler=TokenSampler(mask_token_id=MASK)
            )
        )
    )
    logits = Table().everywhere(ids)
    allowed = logits.clone()
    allowed[..., MASK] = -torch.inf
    best = logits.softmax(-1).gather(-1, allowed.argmax(-1, keepdim=True)).squeeze(-1)
    for row in range(2):
        chosen, others = best[row, first.is_new[row]], best[row, is_open[row] & ~first.is_new[row]]
        assert chosen.min() >= others.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_confidences_are_computed_in_float32_at_least(dtype):
    logits = (3 * torch.randn(64, 500, generator=rng())).to(dtype)
    token, sure = TokenSampler(mask_token_id=499).choose(logits)
    exact = logits.double().softmax(-1).gather(-1, token[:, None]).squeeze(1)
    assert sure.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(sure.double(), exact, rtol=1e-5, atol=0)
    assert (sure.double().argsort() == exact.argsort()).all()
    coarse = logits.bfloat16().softmax(-1).gather(-1, token[:, None])
    assert len(coarse.unique()) < len(sure.unique()), "in bfloat16 some of them would tie"


class Scripted(Confidence):
    """Confidences that are exactly what is written."""

    def __init__(self, *sure):
        self.sure = torch.tensor(sure)

    def confidence(self, logits, token, draw):
        return self.sure[-len(token) :]


class Lines(Table):
    """Logits by column, whatever the ids."""

    def __init__(self, lines):
        self.lines = lines

    def everywhere(self, ids):
        return self.lines.expand(len(ids), -1, -1)


def first_step(sure, **options):
    ids, is_open = canvas_of([0], len(sure))
    rule = TokenSampler(mask_token_id=MASK, remasking=Scripted(*sure))
    return next(iter(denoise_canvas(Table(), ids, is_open, [is_open], sampler=rule, **options)))


@pytest.mark.parametrize(
    ("reveal", "committed"),
    [
        (Above(threshold=0.5, block_size=4, steps=4), [0, 1]),
        (AtLeast(threshold=0.5), [0, 1]),
        # The bound of the second is 1 - 0.75 / 3 = 0.75, which counts; of the third 0.8125.
        (Factor(factor=0.75), [0, 1]),
    ],
    ids=["above", "at least", "factor"],
)
def test_what_is_exactly_as_sure_as_the_threshold(reveal, committed):
    """Not surer than a threshold, so it stays; the factor rule's bound is met, so it is committed."""
    step = first_step((0.875, 0.75, 0.5, 0.25), reveal=reveal)
    assert step.is_new[0].nonzero().squeeze(1).tolist() == committed
    step = first_step(
        (0.875, 0.75, math.nextafter(0.5, 1) + 1e-6, 0.25), reveal=Above(threshold=0.5, block_size=4, steps=4)
    )
    assert int(step.is_new.sum()) == 3


@pytest.mark.parametrize(("sure", "is_edited"), [(0.5, False), (0.5000001, True), (0.4999999, False)])
def test_a_token_is_replaced_by_what_is_surer_than_the_threshold_only(sure, is_edited):
    ids, is_open = canvas_of([0], 2)

    class Changing(Table):
        """Predicts token 1, then token 2."""

        calls = 0

        def everywhere(self, ids):
            self.calls += 1
            return torch.nn.functional.one_hot(torch.full_like(ids, min(self.calls, 2)), V).double()

    rule = TokenSampler(mask_token_id=MASK, remasking=Scripted(sure, sure))
    reveal, edit = AtLeast(threshold=0.0), Edit(threshold=0.5)
    steps = list(denoise_canvas(Changing(), ids, is_open, [is_open], sampler=rule, reveal=reveal, edit=edit))
    assert steps[0].ids.tolist() == [[1, 1]]
    assert steps[1].is_edited.tolist() == [[is_edited] * 2]
    assert steps[-1].ids.tolist() == [[2, 2] if is_edited else [1, 1]]


@pytest.mark.parametrize("postponed", [(), (3,)], ids=["sure", "postponed"])
def test_ties_go_to_the_lower_column_and_the_lower_token(postponed):
    """Equal confidences, or all postponed to 0: left to right, however many there are."""
    width = 40
    lines = torch.zeros(width, V)
    lines[:, [3, 5]] = 4.0
    ids, is_open = canvas_of([0], width)
    rule = TokenSampler(mask_token_id=MASK, postpone=postponed)
    steps = list(denoise_canvas(Lines(lines), ids, is_open, [is_open], steps_per_block=8, sampler=rule))
    order = torch.cat([step.is_new[0].nonzero().squeeze(1) for step in steps])
    assert order.tolist() == list(range(width))
    assert (steps[-1].ids == 3).all()
    assert isinstance(rule.remasking, LowConfidence)


def test_drawing_without_a_generator_is_refused():
    ids, is_open = canvas_of([1], 3)
    for rule in (
        TokenSampler(mask_token_id=MASK, temperature=1.0),
        TokenSampler(mask_token_id=MASK, remasking=make_confidence("random")),
    ):
        with pytest.raises(ConfigError, match="pass a generator"):
            list(denoise_canvas(Table(), ids, is_open, [is_open], steps_per_block=2, sampler=rule))
    with pytest.raises(ConfigError, match="stochastic_transfer"):
        list(
            denoise_canvas(
                Table(),
                ids,
                is_open,
                [is_open],
                reveal=Scheduled(steps=2, is_stochastic=True),
                sampler=TokenSampler(mask_token_id=MASK),
            )
        )


def test_temperature_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 5.0]).expand(20000, -1)
    token, _ = TokenSampler(mask_token_id=4, temperature=2.0).choose(logits, rng())
    share = token.bincount(minlength=5) / len(token)
    expected = (torch.tensor([0.0, 1.0, 2.0, -1.0]) / 2).softmax(-1)
    assert_close(share[:4], expected, atol=0.02, rtol=0)
    assert share[4] == 0


def test_guidance_with_scale_zero_changes_nothing_and_extrapolates_otherwise():
    ids, is_open = canvas_of([3, 2], 4)
    positions, is_given = positions_of(is_open), ~is_open
    plain = Table().logits(ids, positions)
    free = Table().logits(ids.masked_fill(is_given, MASK), positions)
    assert_close(ClassifierFree(Table(), is_given, mask_token_id=MASK, scale=0.0).logits(ids, positions), plain)
    guided = ClassifierFree(Table(), is_given, mask_token_id=MASK, scale=1.5).logits(ids, positions)
    assert_close(guided, free + 2.5 * (plain - free))


class Uniform(Table):
    def everywhere(self, ids):
        return torch.zeros(*ids.shape, V, dtype=torch.float64)


@given(prompt=st.integers(0, 5), target=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_uniform_model_has_the_exact_likelihood(prompt, target, seed):
    ids = torch.randint(0, MASK, (prompt + target,), generator=rng(seed))
    nll = monte_carlo_nll(
        Uniform(), ids[:prompt], ids[prompt:], mask_token_id=MASK, num_samples=8, batch_size=4, generator=rng(seed)
    )
    assert nll == pytest.approx(target * math.log(V), rel=1e-6)
    assert nll.stderr == pytest.approx(0, abs=1e-5)


def test_the_estimate_does_not_depend_on_the_batch_size_beyond_its_error():
    ids = torch.randint(0, MASK, (14,), generator=rng(1))
    estimates = [
        monte_carlo_nll(Table(), ids[:6], ids[6:], mask_token_id=MASK, num_samples=512, batch_size=b, generator=rng(b))
        for b in (4, 16)
    ]
    spread = math.hypot(*(e.stderr for e in estimates))
    assert abs(estimates[0] - estimates[1]) < 5 * spread


@pytest.mark.parametrize("copies", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("target", [*range(1, 13), 16, 24, 48])
def test_every_number_of_masks_is_as_likely_as_any_other(target, copies):
    class Counts(Uniform):
        def logits(self, ids, positions):
            counts.append((ids == MASK).sum(1))
            return super().logits(ids, positions)

    counts: list[torch.Tensor] = []
    ids, rounds = torch.zeros(target, dtype=torch.long), 2000 // copies
    monte_carlo_nll(
        Counts(), ids[:0], ids, mask_token_id=MASK, num_samples=rounds * copies, batch_size=copies, generator=rng(3)
    )
    drawn = torch.stack(counts)
    assert drawn.min() >= 1
    assert drawn.max() <= target
    # Evenly spread in every round: neighbours on the circle of 1..T are equally far apart, to a whole token.
    for each in drawn:
        found = torch.bincount(each - 1, minlength=target)
        assert found.max() - found.min() <= 1
    # And over the rounds no count is preferred: five standard deviations of a uniform draw at most.
    share = torch.bincount(drawn.flatten() - 1, minlength=target) / drawn.numel()
    assert (share - 1 / target).abs().max() <= 5 * math.sqrt((1 - 1 / target) / target / rounds)


def test_a_bound_that_depends_on_the_number_of_masks_is_met_for_every_length():
    class ByCount(Table):
        """The truth, token 1, has exp(-x / 2) where x tokens are masked: the bound is T times the mean of x / 2."""

        def everywhere(self, ids):
            known = (-(ids == MASK).sum(1, keepdim=True) / 2).double().exp().expand(ids.shape)
            logits = torch.full((*ids.shape, V), -50.0, dtype=torch.float64)
            logits[..., 1], logits[..., 2] = known.log(), (1 - known).log()
            return logits

    for target, copies in [(4, 16), (8, 16), (8, 32), (5, 2), (7, 8)]:
        ids = torch.ones(target, dtype=torch.long)
        found = monte_carlo_nll(
            ByCount(), ids[:0], ids, mask_token_id=MASK, num_samples=800 * copies, batch_size=copies, generator=rng(4)
        )
        assert abs(found - target * (target + 1) / 4) < max(5 * found.stderr, 1e-6), (target, copies)


def test_greedy_check_accepts_what_greedy_decoding_gives():
    ids, is_open = canvas_of([4], 5)
    for step in denoise_canvas(
        Table(), ids, is_open, [is_open], steps_per_block=5, sampler=TokenSampler(mask_token_id=MASK)
    ):
        final = step.ids
    assert is_greedy(Table(), ids[0, :4], final[0, 4:], mask_token_id=MASK)
    other = final[0, 4:].clone()
    other[2] = (other[2] + 1) % MASK
    assert not is_greedy(Table(), ids[0, :4], other, mask_token_id=MASK)


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="multiple of batch_size, got 10 and 4"):
        monte_carlo_nll(
            Table(),
            torch.zeros(2).long(),
            torch.zeros(2).long(),
            mask_token_id=MASK,
            num_samples=10,
            batch_size=4,
            generator=rng(),
        )
    with pytest.raises(DataError, match="target_ids is empty"):
        monte_carlo_nll(Table(), torch.zeros(2).long(), torch.zeros(0).long(), mask_token_id=MASK, generator=rng())
