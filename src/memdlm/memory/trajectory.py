"""The path of noised states that a write follows (MemDLM sec. 3).

A strategy turns an anchor, the noised batch that will be read, into the states to learn from. All of it is
vectorised over the batch: every state is "the first n positions", in one random order per row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import final

import torch
from torch import Tensor

from memdlm.types import Counts, Ids, PositionSet, Times, ViewSet, ViewTimes

Draw = Callable[[], Tensor]
"""Returns fresh U[0, 1) numbers [B, L]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """What is written: the clean text and the noised state that it will be read at."""

    clean: Ids
    is_maskable: PositionSet
    is_masked: PositionSet
    """[B, L] the anchor's own masks."""
    t: Times
    """[B] the time the anchor was noised at; at inference the nominal mask ratio."""
    ids: Ids | None = None
    """[B, L] the noised text itself, if there is one: the state with the anchor's masks is then this very tensor."""
    is_same: Tensor | None = None
    """[] bool: whether `ids` has the anchor's masks and no others; None: it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryStep:
    """One state to learn from."""

    clean: Ids
    """[B, L], or a multiple of B rows for several views of each text."""
    ids: Ids
    """The state, with [MASK] at the masked positions."""
    is_masked: PositionSet
    is_scored: PositionSet
    """The masked positions that count in the objective."""
    next_ids: Ids
    """The state one reveal later, which a teacher sees."""
    t: Times
    """Per row, the time that the loss weight uses."""
    num_maskable: Counts
    """Per row, how many positions the text has that can be masked."""
    is_sampled: PositionSet | None = None
    """The scored positions that the objective is estimated from; None: all of them."""

    @property
    def is_read(self) -> PositionSet:
        """The positions that are predicted."""
        return self.is_scored if self.is_sampled is None else self.is_sampled


@dataclass(frozen=True, slots=True)
class Path:
    """Masked sets of the states, the set each teacher sees (None: the clean text), and the times.

    A state of several views of each text has a multiple of B rows, the views of one text as neighbours.
    """

    masked: Sequence[ViewSet]
    teacher: Sequence[ViewSet | None]
    t: Sequence[ViewTimes]


class Strategy(ABC):
    """How a write's states come from its anchor."""

    num_inner_steps: int = 1
    """How many there are."""

    @abstractmethod
    def path(self, anchor: Anchor, draw: Draw) -> Path:
        """Return the states, in the order in which they are learned."""


def order_of(first: PositionSet, is_maskable: PositionSet, uniform: Tensor) -> Tensor:
    """Return each position's place in its row: `first` in random order, then the other maskable ones, then the rest.

    The set `order_of(...) < n` then has n members, grows with n, and is uniform among the sets that contain `first`.
    """
    key = uniform.masked_fill(~is_maskable, 3.0)
    key = torch.where(first & is_maskable, uniform - 2.0, key)
    return key.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)


def drawn(is_maskable: PositionSet, uniform: Tensor, ratio: float) -> PositionSet:
    """Return each maskable position with probability `ratio`, and at least one of every row that has any.

    Where none is drawn, which happens in short texts, it is the one nearest to being drawn: a write that hides nothing
    learns nothing.
    """
    nearest = uniform.masked_fill(~is_maskable, 2.0).argmin(-1, keepdim=True)
    is_drawn = is_maskable & (uniform < ratio)
    is_first = torch.arange(uniform.shape[-1], device=uniform.device) == nearest
    return is_drawn | (is_maskable & is_first & ~is_drawn.any(-1, keepdim=True))


def pre_anchor_counts(num_anchor: Tensor, num_maskable: Tensor, scale: float) -> Tensor:
    """Return floor(min(1, max(s r, r)) * maskable) per row, r = anchor / maskable, in exact arithmetic.

    maskable 14, anchor 6, s = 1.5  ->  floor(1.5 * 6) = 9
    """
    exact = Fraction(str(scale))
    grown = (num_anchor * exact.numerator).div(exact.denominator, rounding_mode="floor")
    return grown.maximum(num_anchor).minimum(num_maskable)


def _share(is_masked: PositionSet, is_maskable: PositionSet) -> Times:
    return is_masked.sum(-1) / is_maskable.sum(-1).clamp_min(1)


@final
@dataclass(frozen=True, slots=True)
class AnchorConsistent(Strategy):
    """From a noisier state, consistent with the anchor, down to exactly the anchor (pmc).

    Between two states, ceil(extra masks / steps left) of the masks that are not the anchor's are revealed. With one
    step there is no reveal: it runs on the pre-anchor, as published.
    """

    num_inner_steps: int = 2
    progressive_consistent_start_scale: float = 1.5

    def path(self, anchor: Anchor, draw: Draw) -> Path:
        """Return K nested states that contain the anchor's masks; the last of several is the anchor."""
        num_anchor, num_maskable = anchor.is_masked.sum(-1), anchor.is_maskable.sum(-1)
        num_masked = pre_anchor_counts(num_anchor, num_maskable, self.progressive_consistent_start_scale)
        place = order_of(anchor.is_masked, anchor.is_maskable, draw())
        masked = [place < num_masked[:, None]]
        for steps_left in range(self.num_inner_steps - 1, 0, -1):
            extra = num_masked - num_anchor
            num_masked = num_masked - (extra + steps_left - 1).div(steps_left, rounding_mode="floor")
            # The last state is the anchor itself, so that what is known of the one serves the other.
            masked.append(anchor.is_masked if steps_left == 1 else place < num_masked[:, None])
        t = [_share(each, anchor.is_maskable) for each in masked]
        return Path(masked, [*masked[1:], None], t)


@final
@dataclass(frozen=True, slots=True)
class Unanchored(Strategy):
    """Mask ratios fall linearly from 0.8 to the prompt ratio, starting from a random mask (progressive_memory)."""

    num_inner_steps: int = 2
    prompt_mask_ratio: float = 0.2

    def path(self, anchor: Anchor, draw: Draw) -> Path:
        """Return K nested states that owe nothing to the anchor."""
        last, steps = Fraction(str(self.prompt_mask_ratio)), self.num_inner_steps
        first = Fraction(4, 5) if steps > 1 else last
        ratios = [first + (last - first) * Fraction(step, max(1, steps - 1)) for step in range(steps)]
        num_maskable = anchor.is_maskable.sum(-1)
        start = drawn(anchor.is_maskable, draw(), float(first))
        place = order_of(start, anchor.is_maskable, draw())
        masked = [start]
        for ratio in ratios[1:]:
            count = (num_maskable * ratio.numerator).div(ratio.denominator, rounding_mode="floor")
            count = count.clamp_min(1)  # short of 1 / ratio tokens it would be 0
            masked.append(start & (place < count[:, None]))
        t = [torch.full_like(anchor.t, float(ratio)) for ratio in ratios]
        return Path(masked, [*masked[1:], None], t)


@final
@dataclass(frozen=True, slots=True)
class PreAnchorOnly(Strategy):
    """One step, on the pre-anchor; the teacher sees the anchor (pre_only)."""

    progressive_consistent_start_scale: float = 1.5

    def path(self, anchor: Anchor, draw: Draw) -> Path:
        """Return the pre-anchor alone."""
        counts = pre_anchor_counts(
            anchor.is_masked.sum(-1), anchor.is_maskable.sum(-1), self.progressive_consistent_start_scale
        )
        masked = order_of(anchor.is_masked, anchor.is_maskable, draw()) < counts[:, None]
        return Path([masked], [anchor.is_masked], [_share(masked, anchor.is_maskable)])


@final
@dataclass(frozen=True, slots=True)
class AnchorOnly(Strategy):
    """One step, on the anchor (no_progressive)."""

    def path(self, anchor: Anchor, draw: Draw) -> Path:
        """Return the anchor alone."""
        return Path([anchor.is_masked], [None], [anchor.t])


@final
@dataclass(frozen=True, slots=True)
class Strided(Strategy):
    """Masked views that together hide every token once, each with its neighbours in sight (strided).

    View i hides the positions that are congruent to i + offset modulo `strides`; the offset is random per text. The
    views are shared out among the steps as evenly as possible, several views of a step being one state; more steps
    than views begin again. A stride hides a value together with its cue where their distance is a multiple of it, so
    it should exceed that distance.
    """

    num_inner_steps: int = 2
    strides: int = 2

    def path(self, anchor: Anchor, draw: Draw) -> Path:
        """Return K states that owe nothing to the anchor."""
        rows, length = anchor.is_maskable.shape
        column = torch.arange(length, device=anchor.is_maskable.device)
        offset = (draw()[:, :1] * self.strides).long().clamp(max=self.strides - 1)
        place = (column + offset) % self.strides
        states = min(self.num_inner_steps, self.strides)
        masked = []
        for step in range(self.num_inner_steps):
            first, last = (number * self.strides // states for number in (step % states, step % states + 1))
            views = torch.arange(first, last, device=column.device)
            is_hidden = (place[:, None] == views[:, None]) & anchor.is_maskable[:, None]
            masked.append(is_hidden.flatten(0, 1))
        t = [_share(each, anchor.is_maskable.repeat_interleave(each.shape[0] // rows, dim=0)) for each in masked]
        return Path(masked, [None] * len(masked), t)


STRATEGIES: dict[str, type[Strategy]] = {
    "pmc": AnchorConsistent,
    "progressive_memory_consistent": AnchorConsistent,
    "progressive_memory": Unanchored,
    "pre_only": PreAnchorOnly,
    "no_progressive": AnchorOnly,
    "strided": Strided,
}

SCORED = ("student_masked", "newly_revealed")
"""Which masked positions count: all of them, or those that the next state reveals (at the last state: all)."""


def scored_sets(path: Path, scored: str) -> list[PositionSet]:
    """Return the positions of every state that count in the objective."""
    if scored != "newly_revealed":
        return list(path.masked)
    pairs = zip(path.masked, path.teacher, strict=True)
    return [is_masked if teacher is None else is_masked & ~teacher for is_masked, teacher in pairs]


def sampled(is_scored: PositionSet, fraction: float, draw: Draw) -> PositionSet:
    """Return a random part of every row's scored positions: ceil(fraction * n) of n, in exact arithmetic.

    How many follows from n alone; which ones, from `draw` [B, L]. The views of a text share their numbers.
    """
    uniform = draw()
    uniform = uniform.repeat_interleave(len(is_scored) // len(uniform), dim=0)
    # A denominator of at most a million: the product stays within 64 bits.
    exact = Fraction(str(fraction)).limit_denominator(10**6)
    scored = is_scored.sum(-1)
    size = (scored * exact.numerator + exact.denominator - 1).div(exact.denominator, rounding_mode="floor")
    # No row that scores anything may be left without a position: nothing would stand for it.
    return order_of(is_scored, is_scored, uniform) < size.clamp_min(1).minimum(scored)[:, None]


def with_sizes(anchor: Anchor, chosen: Sequence[ViewSet]) -> tuple[Anchor, list[int]]:
    """Return the anchor, without its noised text if that has other masks too, and the sizes of the sets `chosen`.

    This is the one place where a write waits for the device.
    """
    asked = [each.sum() for each in chosen]
    if anchor.is_same is None:
        return anchor, torch.stack(asked).tolist()
    *counts, is_same = torch.stack([*asked, anchor.is_same.to(asked[0].dtype)]).tolist()
    return anchor if is_same else replace(anchor, ids=None), counts


def trajectory(path: Path, anchor: Anchor, *, mask_token_id: int, scored: str) -> list[TrajectoryStep]:
    """Fill a path with tokens. Equal sets give the same tensor of ids: a teacher's text is the next state's."""
    filled = {} if anchor.ids is None else {id(anchor.is_masked): anchor.ids}
    clean = {len(anchor.clean): anchor.clean}
    num_maskable = anchor.is_maskable.sum(-1)

    def fill(is_masked: PositionSet) -> Ids:
        if id(is_masked) not in filled:
            filled[id(is_masked)] = clean[len(is_masked)].masked_fill(is_masked, mask_token_id)
        return filled[id(is_masked)]

    steps = []
    sets = zip(path.masked, path.teacher, path.t, scored_sets(path, scored), strict=True)
    for is_masked, teacher, t, is_scored in sets:
        rows = len(is_masked)
        if rows not in clean:
            clean[rows] = anchor.clean.repeat_interleave(rows // len(anchor.clean), dim=0)
        steps.append(
            TrajectoryStep(
                clean=clean[rows],
                ids=fill(is_masked),
                is_masked=is_masked,
                is_scored=is_scored,
                next_ids=clean[rows] if teacher is None else fill(teacher),
                t=t,
                num_maskable=num_maskable.repeat_interleave(rows // len(num_maskable)),
            )
        )
    return steps
