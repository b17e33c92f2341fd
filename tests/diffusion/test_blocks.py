"""Block samplers against plain transcriptions of the published loops, on scripted logits; laws of every reveal rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import MASK, Table, V

from memdlm.diffusion import (
    Above,
    AtLeast,
    Edit,
    EosStop,
    Even,
    Factor,
    Scheduled,
    StableAnswer,
    TokenSampler,
    absolute_blocks_from,
    denoise_canvas,
    make_schedule,
    reveal_counts,
)
from memdlm.types import Denoise

RULE = TokenSampler(mask_token_id=MASK)


class Sharp(Table):
    """Sure enough for thresholds to matter, and never of the mask token, which the published loops may predict."""

    def __init__(self, seed, scale):
        super().__init__()
        self.scale, self.shift = scale, seed

    def everywhere(self, ids):
        logits = self.scale * super().everywhere((ids + self.shift) % V)
        logits[..., MASK] = -torch.inf
        return logits


def canvas_of(prompt, new, block, seed=0):
    lengths = torch.tensor(prompt)
    length = -(-(max(prompt) + new) // block) * block
    ends = -(-(lengths + new) // block) * block
    column = torch.arange(length)
    is_open = (column >= lengths[:, None]) & (column < ends[:, None])
    ids = torch.randint(0, MASK, (len(prompt), length), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(is_open, MASK), is_open, absolute_blocks_from(lengths, length, new, block)


def edited(denoise, ids, prompt, length, block, *, threshold, editing, post_steps, fewest):
    """Spec/3, 2.8.2, of one row: the canvas after every forward pass."""
    ids, canvases = ids.clone(), []
    for number in range(prompt // block, length // block):
        columns = torch.arange(number * block, (number + 1) * block)
        post = 0
        while True:
            old = ids[columns].clone()
            open_ = old == MASK
            if not open_.any():
                post += 1
            if post > post_steps:
                break
            probability, token = denoise.everywhere(ids[None])[0, columns].float().softmax(-1).max(-1)
            transfer = open_ & (probability > threshold)
            if transfer.sum() < fewest:
                candidates = probability.masked_fill(~open_, -1)
                transfer = torch.zeros_like(open_)
                transfer[candidates.sort(descending=True, stable=True).indices[: min(fewest, int(open_.sum()))]] = True
            change = ~open_ & (columns >= prompt) & (probability > editing) & (token != old)
            ids[columns] = torch.where(transfer | change, token, old)
            canvases.append(ids.clone())
            if not open_.any() and not change.any():
                break
    return canvases


EDITS = {
    "new": st.integers(1, 9),
    "block": st.integers(1, 5),
    "seed": st.integers(0, 40),
    "scale": st.sampled_from([0.3, 1.0, 3.0]),
    "threshold": st.sampled_from([0.2, 0.5, 0.9]),
    "editing": st.sampled_from([0.0, 0.4, 0.8]),
    "post_steps": st.integers(0, 3),
    "fewest": st.integers(1, 3),
}


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(0, 7), **EDITS)
def test_token_editing_is_the_published_loop(prompt, new, block, seed, scale, threshold, editing, post_steps, fewest):
    denoise = Sharp(seed, scale)
    ids, is_open, blocks = canvas_of([prompt], new, block, seed)
    limits = {"threshold": threshold, "editing": editing, "post_steps": post_steps, "fewest": fewest}
    theirs = edited(denoise, ids[0], prompt, ids.shape[1], block, **limits)
    ours = list(
        denoise_canvas(
            denoise,
            ids,
            is_open,
            blocks,
            sampler=RULE,
            reveal=AtLeast(threshold=threshold, num_to_transfer=fewest),
            edit=Edit(threshold=editing, max_post_steps=post_steps),
        )
    )
    assert [step.ids[0].tolist() for step in ours] == [canvas.tolist() for canvas in theirs]


@settings(max_examples=25, deadline=None)
@given(prompts=st.lists(st.integers(0, 7), min_size=2, max_size=4), **EDITS)
def test_edited_rows_do_not_depend_on_each_other(
    prompts, new, block, seed, scale, threshold, editing, post_steps, fewest
):
    denoise = Sharp(seed, scale)
    ids, is_open, blocks = canvas_of(prompts, new, block, seed)
    limits = {"threshold": threshold, "editing": editing, "post_steps": post_steps, "fewest": fewest}
    final = ids
    for step in denoise_canvas(
        denoise,
        ids,
        is_open,
        blocks,
        sampler=RULE,
        reveal=AtLeast(threshold=threshold, num_to_transfer=fewest),
        edit=Edit(threshold=editing, max_post_steps=post_steps),
    ):
        final = step.ids
    for row, prompt in enumerate(prompts):
        end = -(-(prompt + new) // block) * block
        alone = edited(denoise, ids[row], prompt, end, block, **limits)
        assert final[row, :end].equal(alone[-1][:end])


def thresholded(denoise, ids, prompt, new, block, *, threshold, steps):
    """Spec/3, 2.8.1, of one row."""
    ids, canvases = ids.clone(), []
    steps = min(steps, new)
    quotas = [block // steps + (index < block % steps) for index in range(steps)]
    for number in range(prompt // block, ids.numel() // block):
        columns = torch.arange(number * block, (number + 1) * block)
        for quota in quotas:
            open_ = ids[columns] == MASK
            if not open_.any():
                break
            probability, token = denoise.everywhere(ids[None])[0, columns].float().softmax(-1).max(-1)
            high = open_ & (probability > threshold)
            if high.sum() < quota:
                best = probability.masked_fill(~open_, -1).sort(descending=True, stable=True).indices
                high = torch.zeros_like(open_)
                high[best[: min(quota, int(open_.sum()))]] = True
            ids[columns] = torch.where(high, token, ids[columns])
            canvases.append(ids.clone())
    return canvases


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(0, 7),
    new=st.integers(1, 9),
    block=st.integers(1, 5),
    steps=st.integers(1, 8),
    seed=st.integers(0, 40),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
    threshold=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
)
def test_block_decoding_is_the_published_loop(prompt, new, block, steps, seed, scale, threshold):
    denoise = Sharp(seed, scale)
    ids, is_open, blocks = canvas_of([prompt], new, block, seed)
    reveal = Above(threshold=threshold, block_size=block, steps=min(steps, new))
    ours = [s.ids[0].tolist() for s in denoise_canvas(denoise, ids, is_open, blocks, sampler=RULE, reveal=reveal)]
    theirs = thresholded(denoise, ids[0], prompt, new, block, threshold=threshold, steps=steps)
    assert ours == [canvas.tolist() for canvas in theirs]


REVEALS = {
    "scheduled": Scheduled(steps=3),
    "cosine": Scheduled(steps=4, schedule=make_schedule("cosine")),
    "stochastic": Scheduled(steps=4, is_stochastic=True),
    "even": Even(steps=3),
    "above": Above(threshold=0.4, block_size=5, steps=3),
    "at_least": AtLeast(threshold=0.4, num_to_transfer=2),
    "factor": Factor(factor=0.8),
}


class Stubborn(Denoise):
    """Always wants the mask token, and nothing else in particular."""

    def logits(self, ids, positions):
        return torch.zeros(positions.numel(), V).index_fill(1, torch.tensor([MASK]), 50.0)

    def hidden(self, ids, positions):
        raise NotImplementedError


@pytest.mark.parametrize("denoise", [Sharp(1, 1.0), Stubborn()], ids=["sharp", "mask"])
@pytest.mark.parametrize("edit", [None, Edit(threshold=0.1, max_post_steps=3)], ids=["", "edit"])
@pytest.mark.parametrize("reveal", REVEALS.values(), ids=REVEALS.keys())
def test_every_rule_fills_everything_in_bounded_steps(reveal, edit, denoise):
    prompts, new, block = [3, 0, 7], 9, 5
    ids, is_open, blocks = canvas_of(prompts, new, block)
    steps = list(
        denoise_canvas(
            denoise,
            ids,
            is_open,
            blocks,
            sampler=RULE,
            reveal=reveal,
            edit=edit,
            generator=torch.Generator().manual_seed(1),
        )
    )
    assert (steps[-1].ids != MASK).all()
    assert len(steps) <= len(blocks) * (block + (3 if edit else 0))
    assert torch.stack([step.is_new for step in steps]).sum(0).equal(is_open.long())
    assert steps[-1].ids[~is_open].equal(ids[~is_open])


@given(n=st.integers(0, 60), steps=st.integers(1, 40))
def test_llada_shares(n, steps):
    quotas = Even(steps=steps).quotas(torch.tensor([n]), None)[0].tolist()
    expected = [n // steps + (index < n % steps) for index in range(steps)]
    assert quotas == [each for each in expected if each]


def test_the_two_published_schedules_differ_as_documented():
    linear = make_schedule("linear")
    assert Even(steps=4).quotas(torch.tensor([10]), None).tolist() == [[3, 3, 2, 2]]
    assert reveal_counts(torch.tensor([10]), 4, schedule=linear).tolist() == [[2, 3, 2, 3]]
    differing = 0
    for n in range(1, 41):
        for steps in range(1, 41):
            even = Even(steps=steps).quotas(torch.tensor([n]), None)
            differing += even.tolist() != reveal_counts(torch.tensor([n]), steps, schedule=linear).tolist()
    assert differing == 626


def test_the_factor_rule_counts_from_the_surest():
    confidence = torch.tensor([[0.9, 0.8, 0.76, 0.5], [0.1, 0.1, 0.1, -math.inf]])
    # 1 - 0.9 / (r + 1) for r = 1, 2, 3, 4: 0.55, 0.70, 0.775, 0.82.
    assert Factor(factor=0.9).count(confidence, torch.tensor([1, 1])).tolist() == [2, 1]


@given(seed=st.integers(0, 999), k=st.integers(1, 12), p=st.floats(0.05, 1.0))
def test_filters_keep_what_they_say(seed, k, p):
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    kept = TokenSampler(mask_token_id=MASK, top_k=k)._filtered(logits).isfinite()
    least = logits.sort(-1, descending=True).values[:, k - 1 : k]
    assert kept.equal(logits >= least)
    kept = TokenSampler(mask_token_id=MASK, top_p=p)._filtered(logits).isfinite()
    for row, keep in zip(logits.softmax(-1), kept, strict=True):
        total = 0.0
        for index in row.sort(descending=True, stable=True).indices.tolist():
            assert keep[index] == (total <= p) or abs(total - p) < 1e-6
            total += row[index].item()


def test_a_row_stops_at_its_first_end_and_not_before_it_is_known():
    is_response = torch.tensor([[0, 1, 1, 1, 1]] * 4).bool()
    ids = torch.tensor([[9, 1, 9, MASK, MASK], [9, MASK, 9, 1, 1], [9, 1, 1, 1, MASK], [9, 9, MASK, MASK, MASK]])
    finished = EosStop((9,), is_response).finished(ids, ids == MASK)
    assert finished.tolist() == [True, False, False, True]


def test_a_stable_answer_is_committed_at_once():
    class Constant(Stubborn):
        def logits(self, ids, positions):
            column = positions % ids.shape[1]
            return torch.nn.functional.one_hot(column % MASK, V).float() + column[:, None] / 100

    ids, is_open, blocks = canvas_of([2], 8, 10)
    plain = list(denoise_canvas(Constant(), ids, is_open, blocks, sampler=RULE, steps_per_block=8))
    stable = StableAnswer(2)
    early = list(denoise_canvas(Constant(), ids, is_open, blocks, sampler=RULE, steps_per_block=8, stable=stable))
    assert len(plain) == 8
    assert len(early) == 3
    assert early[-1].ids.equal(plain[-1].ids)
