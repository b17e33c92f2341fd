"""The reverse process: one loop that fills the open positions of a canvas, block by block, step by step.

The loop owns the control flow. Small objects decide what varies: which token and how sure (`TokenSampler`), how many
tokens a step commits (`Reveal`), whether committed tokens may change (`Edit`), when a row is finished (`EosStop`). The
blocks are data. A step sees the whole canvas but predicts only positions of its block. The mask token is never
predicted, so nothing is left open, and every block takes a bounded number of steps.

Rows share only the pace: a row without open positions in the current block is not predicted, so the denoiser need not
run it. Equally sure predictions are committed in the order of their columns, on every device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from memdlm.diffusion.choice import TokenSampler
from memdlm.diffusion.masking import positions_of
from memdlm.diffusion.reveal import Reveal, Scheduled
from memdlm.diffusion.stopping import EosStop, StableAnswer
from memdlm.errors import ConfigError, NotFiniteError
from memdlm.finite import are_logits
from memdlm.randomness import Randomness
from memdlm.types import Denoise, Ids, Logits, PositionSet


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Token editing (LLaDA2.1): a committed token of the current block is replaced by a surer, different prediction.

    A full block is predicted again until nothing changes, at most `max_post_steps` times.
    """

    threshold: float = 0.9
    max_post_steps: int = 16


@dataclass(frozen=True, slots=True)
class Step:
    """One committed denoising step."""

    ids: Ids
    """[B, T] the canvas after the step."""
    is_new: PositionSet
    """[B, T] true where the step committed a token."""
    num_scored: int
    """Positions that reached the vocabulary projection."""
    confidence: Tensor
    """[B, T] the confidence of each prediction, -inf where nothing was predicted."""
    is_edited: PositionSet
    """[B, T] true where the step replaced a token."""


def denoise_canvas(
    denoise: Denoise,
    ids: Ids,
    is_open: PositionSet,
    blocks: Sequence[PositionSet],
    *,
    sampler: TokenSampler,
    steps_per_block: int | None = None,
    reveal: Reveal | None = None,
    edit: Edit | None = None,
    stop: EosStop | None = None,
    stable: StableAnswer | None = None,
    generator: Randomness | None = None,
) -> Iterator[Step]:
    """Fill the open positions of `ids` [B, T], one block after the other, and yield after every step.

    `blocks` are position sets; rows may differ in everything: prompt length, block, open tokens. `reveal` says how many
    tokens a step commits; with `steps_per_block` the linear schedule does, over so many steps. Runs without gradient.

    Raises NotFiniteError when the network's logits hold NaN or infinity: on the CPU before the step is yielded,
    elsewhere where the next step waits for the device anyway.
    """
    if (reveal is None) == (steps_per_block is None):
        raise ConfigError("pass exactly one of reveal and steps_per_block.")
    reveal = Scheduled(steps=steps_per_block or 1) if reveal is None else reveal
    loop = _Loop(denoise, sampler, reveal, edit, stop, stable, generator, _Logits(ids.device))
    left = is_open
    for block in blocks:
        for step, still_open in loop.fill(ids, left, block):
            ids, left = step.ids, still_open
            yield step
        if stop is not None and edit is not None:
            left = left & ~stop.finished(ids, left)[:, None]
    loop.seen.check()


@dataclass(frozen=True, slots=True)
class _Loop:
    denoise: Denoise
    sampler: TokenSampler
    reveal: Reveal
    edit: Edit | None
    stop: EosStop | None
    stable: StableAnswer | None
    generator: Randomness | None
    seen: "_Logits"

    def fill(self, ids: Ids, is_open: PositionSet, block: PositionSet) -> Iterator[tuple[Step, PositionSet]]:
        """Fill one block; yields every step with what is still open after it."""
        region = is_open & block
        # Waits for the device, here and once per step: which positions to predict depends on the step before.
        known = (region & self.seen.are_finite).cpu()
        num_open = known.sum(-1)
        quotas = self.reveal.quotas(num_open, self.generator)
        is_foreseen = self._is_foreseen(ids.device)
        there = quotas.to(ids.device, non_blocking=True)
        zero = torch.zeros_like(ids[:, 0])
        extra = 0 if self.edit is None else 1 + self.edit.max_post_steps
        review = _Review(region, self.edit)
        streak = _Streak(ids, self.stable)
        for index in range(quotas.shape[1] + extra):
            in_block = is_open & block
            is_scored = in_block if self.edit is None else review.scored(in_block)
            if index > 0 and is_foreseen:
                # In rows that go on, all positions of the block; predictions for filled positions are ignored.
                known = known & (num_open > quotas[:, :index].sum(1))[:, None]
            elif index > 0:
                known = (is_scored & self.seen.are_finite).cpu()
            positions = positions_of(known)
            if positions.numel() == 0:
                self.seen.check()
                return
            quota = there[:, index] if index < quotas.shape[1] else zero
            step = self._step(ids, is_scored, in_block, positions, quota, streak)
            review.seen(in_block, step.is_edited)
            ids, is_open = step.ids, is_open & ~step.is_new
            if self.stop is not None and self.edit is None:
                is_open = is_open & ~self.stop.finished(ids, is_open)[:, None]
            yield step, is_open

    def _is_foreseen(self, device: torch.device) -> bool:
        """Whether the number of tokens that each step of a block commits is known when the block begins.

        The loop then need not wait for a device between the steps. It is False on the CPU, where there is nothing to
        gain and filled positions would be predicted again; and with a sampler that draws, whose draws would change.
        """
        ends = (self.stop, self.edit, self.stable)
        is_fixed = self.reveal.is_fixed and not self.sampler.draws and all(each is None for each in ends)
        return is_fixed and device.type != "cpu"

    @torch.no_grad()
    def _step(
        self,
        ids: Ids,
        is_scored: PositionSet,
        in_block: PositionSet,
        positions: Tensor,
        quota: Tensor,
        streak: "_Streak",
    ) -> Step:
        rows = positions // ids.shape[1]
        logits = self.denoise.logits(ids, positions)
        self.seen.see(logits)
        token, confidence = self.sampler.choose(logits, self.generator, rows)
        positions = positions.to(ids.device, non_blocking=True)
        predicted = ids.flatten().scatter(0, positions, token).view_as(ids)
        sure = confidence.new_full(ids.shape, float("-inf")).flatten().scatter(0, positions, confidence).view_as(ids)
        sure = sure.masked_fill(~is_scored, float("-inf"))
        candidates = sure.masked_fill(~in_block, float("-inf"))
        # The stable sort settles ties by column, whatever the device and whoever else is in the batch.
        ranked, order = candidates.sort(dim=-1, descending=True, stable=True)
        count = streak.count(predicted, in_block, self.reveal.count(ranked, quota))
        wanted = torch.arange(order.shape[1], device=ids.device) < count[:, None]
        is_new = torch.zeros_like(in_block).scatter(1, order, wanted) & in_block
        is_edited = torch.zeros_like(is_new)
        if self.edit is not None:
            is_edited = is_scored & ~in_block & (sure > self.edit.threshold) & (predicted != ids)
        return Step(torch.where(is_new | is_edited, predicted, ids), is_new, positions.numel(), sure, is_edited)


class _Logits:
    """Whether all logits so far allowed a choice; once they do not, no more positions are predicted."""

    def __init__(self, device: torch.device) -> None:
        self.are_finite = torch.ones((), dtype=torch.bool, device=device)

    def see(self, logits: Logits) -> None:
        """Take new logits into account; on the CPU, where checking is free, raise at once."""
        self.are_finite = self.are_finite & are_logits(logits).to(self.are_finite.device)
        if self.are_finite.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise NotFiniteError if some logits held NaN or infinity; waits for the device."""
        if not bool(self.are_finite):
            raise NotFiniteError("the model's logits hold NaN or infinity, from which no token can be chosen.")


class _Review:
    """Which rows predict a full block again under token editing."""

    def __init__(self, region: PositionSet, edit: Edit | None) -> None:
        self.region, self.edit = region, edit
        self.is_reviewing = region.any(-1)
        self.post = torch.zeros_like(self.is_reviewing, dtype=torch.int64)

    def scored(self, in_block: PositionSet) -> PositionSet:
        """Return what the next step predicts: all of the block that is not prompt, in rows that go on."""
        assert self.edit is not None
        self.post = self.post + (~in_block.any(-1)).long()
        self.is_reviewing = self.is_reviewing & (self.post <= self.edit.max_post_steps)
        return self.region & self.is_reviewing[:, None]

    def seen(self, in_block: PositionSet, is_edited: PositionSet) -> None:
        """End the rows whose full block the step left as it was."""
        self.is_reviewing = self.is_reviewing & (in_block.any(-1) | is_edited.any(-1))


class _Streak:
    """For how many steps each row's predictions have not changed."""

    def __init__(self, ids: Ids, stable: StableAnswer | None) -> None:
        self.stable = stable
        self.before = ids
        self.length = torch.zeros_like(ids[:, 0])

    def count(self, predicted: Ids, in_block: PositionSet, count: Tensor) -> Tensor:
        """Return `count` [B], or everything in rows that have been stable for long enough."""
        if self.stable is None:
            return count
        is_same = ((predicted == self.before) | ~in_block).all(-1)
        self.length = torch.where(is_same, self.length + 1, 0)
        self.before = predicted
        return torch.where(self.length >= self.stable.steps, in_block.shape[1], count)
