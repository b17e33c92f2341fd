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
from memdlm.types import Denoise, Ids, Logits, Positions, PositionSet, TokenIds, Values


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
    filling = Filling(
        ids,
        is_open,
        blocks,
        reveal=Scheduled(steps=steps_per_block or 1) if reveal is None else reveal,
        edit=edit,
        stop=stop,
        stable=stable,
        generator=generator,
        draws=sampler.draws,
    )
    yield from filled(filling, denoise, sampler, generator)


@torch.no_grad()
def _predicted(
    filling: "Filling", denoise: Denoise, sampler: TokenSampler, positions: Positions, generator: Randomness | None
) -> tuple[Tensor, Tensor]:
    logits = denoise.logits(filling.ids, positions)
    filling.seen.see(logits)
    return sampler.choose(logits, generator, positions // filling.ids.shape[1])


def filled(
    filling: "Filling", denoise: Denoise, sampler: TokenSampler, generator: Randomness | None = None
) -> Iterator[Step]:
    """Run `filling` to its end; yields after every step. The rest is as in `denoise_canvas`."""
    while (positions := filling.wanted()) is not None:
        yield filling.commit(positions, *_predicted(filling, denoise, sampler, positions, generator))
    filling.seen.check()


@final
class Filling:
    """A canvas while it is filled: it says what is to be predicted next, and takes the predictions.

    Whoever has it runs the network and chooses tokens, for this canvas alone (`denoise_canvas`) or for many canvases
    in one pass. The arguments are those of `denoise_canvas`; `draws` says whether the sampler draws.
    """

    def __init__(
        self,
        ids: Ids,
        is_open: PositionSet,
        blocks: Sequence[PositionSet],
        *,
        reveal: Reveal,
        edit: Edit | None = None,
        stop: EosStop | None = None,
        stable: StableAnswer | None = None,
        generator: Randomness | None = None,
        draws: bool = False,
    ) -> None:
        self.ids, self.is_open = ids, is_open
        self.block = 0
        """Which of the blocks is being filled."""
        self.reveal, self.edit, self.stop, self.stable, self.generator = reveal, edit, stop, stable, generator
        self.seen = _Logits(ids.device)
        self._blocks = blocks
        self._current: _Block | None = None
        ends = (stop, edit, stable)
        # The loop then need not wait for a device between the steps. On the CPU there is nothing to gain, and filled
        # positions would be predicted again; the draws of a sampler would change.
        self._is_foreseen = (
            reveal.is_fixed and not draws and all(each is None for each in ends) and ids.device.type != "cpu"
        )

    def wanted(self) -> Positions | None:
        """Return the positions [N] that the next step predicts, on the CPU; None: every block is filled."""
        while self.block < len(self._blocks):
            if self._current is None:
                self._current = _Block(self, self._blocks[self.block])
            positions = self._current.wanted(self)
            if positions is not None:
                return positions
            if self.stop is not None and self.edit is not None:
                self.is_open = self.is_open & ~self.stop.finished(self.ids, self.is_open)[:, None]
            self._current, self.block = None, self.block + 1
        return None

    def commit(self, positions: Positions, token: TokenIds, confidence: Values) -> Step:
        """Take `token` [N] and `confidence` [N], predicted at the `positions` [N] that were wanted."""
        current = self._current
        assert current is not None, "nothing was wanted"
        step = current.step(self, positions, token, confidence)
        self.ids, self.is_open = step.ids, self.is_open & ~step.is_new
        if self.stop is not None and self.edit is None:
            self.is_open = self.is_open & ~self.stop.finished(self.ids, self.is_open)[:, None]
        return step


class _Block:
    """The block that a `Filling` is in, and how far it has come."""

    def __init__(self, filling: Filling, block: PositionSet) -> None:
        self.block, device = block, filling.ids.device
        region = filling.is_open & block
        # Waits for the device, here and once per step: which positions to predict depends on the step before.
        self.known = filling.seen.known(region)
        self.num_open = self.known.sum(-1)
        self.quotas = filling.reveal.quotas(self.num_open, filling.generator)
        self.there = self.quotas.to(device, non_blocking=True)
        self.zero = torch.zeros_like(filling.ids[:, 0])
        extra = 0 if filling.edit is None else 1 + filling.edit.max_post_steps
        self.most = self.quotas.shape[1] + extra
        self.review = _Review(region, filling.edit)
        self.streak = _Streak(filling.ids, filling.stable)
        self.index = 0
        self.in_block = self.is_scored = region

    def wanted(self, filling: Filling) -> Positions | None:
        """Return what the next step predicts; None: the block is done."""
        if self.index >= self.most:
            return None
        self.in_block = filling.is_open & self.block
        self.is_scored = self.in_block if filling.edit is None else self.review.scored(self.in_block)
        if self.index > 0 and filling._is_foreseen:
            # In rows that go on, all positions of the block; predictions for filled positions are ignored.
            self.known = self.known & (self.num_open > self.quotas[:, : self.index].sum(1))[:, None]
        elif self.index > 0:
            self.known = filling.seen.known(self.is_scored)
        positions = positions_of(self.known)
        if positions.numel() == 0:
            filling.seen.check()
            return None
        return positions

    @torch.no_grad()
    def step(self, filling: Filling, positions: Positions, token: TokenIds, confidence: Values) -> Step:
        """Commit what the reveal allows."""
        ids, in_block, is_scored, edit = filling.ids, self.in_block, self.is_scored, filling.edit
        quota = self.there[:, self.index] if self.index < self.quotas.shape[1] else self.zero
        self.index += 1
        positions = positions.to(ids.device, non_blocking=True)
        predicted = ids.flatten().scatter(0, positions, token).view_as(ids)
        sure = confidence.new_full(ids.shape, float("-inf")).flatten().scatter(0, positions, confidence).view_as(ids)
        sure = sure.masked_fill(~is_scored, float("-inf"))
        candidates = sure.masked_fill(~in_block, float("-inf"))
        # The stable sort settles ties by column, whatever the device and whoever else is in the batch.
        ranked, order = candidates.sort(dim=-1, descending=True, stable=True)
        count = self.streak.count(predicted, in_block, filling.reveal.count(ranked, quota))
        wanted = torch.arange(order.shape[1], device=ids.device) < count[:, None]
        is_new = torch.zeros_like(in_block).scatter(1, order, wanted) & in_block
        is_edited = torch.zeros_like(is_new)
        if edit is not None:
            is_edited = is_scored & ~in_block & (sure > edit.threshold) & (predicted != ids)
        self.review.seen(in_block, is_edited)
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

    def known(self, is_scored: PositionSet) -> PositionSet:
        """Return the set on the CPU, empty if some logits allowed no choice; waits for the device."""
        return (is_scored & self.are_finite).cpu()

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
