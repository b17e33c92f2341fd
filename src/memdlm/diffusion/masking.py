"""The forward process: which tokens are replaced by [MASK], and the positions that this leaves to predict."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memdlm.diffusion.schedules import Schedule
from memdlm.errors import ConfigError
from memdlm.types import (
    IGNORE_INDEX,
    Draws,
    Elementwise,
    Ids,
    OfParts,
    PartTimes,
    Positions,
    PositionSet,
    Times,
)


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """The time that each block of `block` columns was noised at; the last block may be short."""

    t: PartTimes
    block: int

    def spread(self, of_blocks: OfParts, length: int) -> Tensor:
        """Return [B, length]: at each column the value of its block."""
        return of_blocks.repeat_interleave(self.block, dim=1)[:, :length]


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A noised batch, x_t."""

    ids: Ids
    """[B, L] with [MASK] at the masked positions."""
    is_masked: PositionSet
    """[B, L] true where [MASK] stands."""
    t: Times
    """[B] the time each row was noised at; with times of blocks, their mean over the row's maskable tokens."""
    of_blocks: BlockTimes | None = None
    """The times, where each block has its own (block diffusion)."""

    def parts(self) -> BlockTimes:
        """Return the times by part of a row that shares one: its blocks, or all of it as a single part."""
        return BlockTimes(self.t[:, None], max(1, self.ids.shape[1])) if self.of_blocks is None else self.of_blocks


def maskable_positions(labels: Tensor, attention_mask: Tensor | None = None) -> PositionSet:
    """Return [B, L]: where `labels` is not -100 and, given a 2-D mask, where the position may be seen."""
    is_maskable = labels != IGNORE_INDEX
    if attention_mask is not None and attention_mask.dim() == 2:
        is_maskable = is_maskable & attention_mask.bool()
    return is_maskable


def before_targets(is_target: PositionSet, attention_mask: Tensor | None = None) -> PositionSet:
    """Return [B, L]: the prompt of every row, which is what stands before its first target and may be seen."""
    column = torch.arange(is_target.shape[1], device=is_target.device)
    start = torch.where(is_target.any(-1), is_target.int().argmax(-1), is_target.shape[1])
    is_before = column < start[:, None]
    if attention_mask is not None and attention_mask.dim() == 2:
        is_before = is_before & attention_mask.bool()
    return is_before


def draw_times(uniform: Elementwise, epsilon: float) -> Elementwise:
    """Map U[0, 1) draws to times in [epsilon, 1); raises ConfigError unless 0 < epsilon < 1."""
    if not 0 < epsilon < 1:
        raise ConfigError(f"time_epsilon must lie strictly between 0 and 1, got {epsilon!r}.")
    return epsilon + (1 - epsilon) * uniform


def corrupt(
    clean: Ids,
    is_maskable: PositionSet,
    t: Times,
    uniform: Draws,
    *,
    schedule: Schedule,
    mask_token_id: int,
) -> Corrupted:
    """Replace each maskable token by [MASK] with probability 1 - alpha(t), t being its row's time (q(x_t | x_0)).

    `uniform` [B, L] holds the U[0, 1) draws, so the same draws give the same noise whatever else changes.
    """
    is_masked = is_maskable & (uniform < (1 - schedule.alpha(t))[:, None])
    return Corrupted(clean.masked_fill(is_masked, mask_token_id), is_masked, t)


def corrupt_blocks(
    clean: Ids,
    is_maskable: PositionSet,
    times: BlockTimes,
    uniform: Draws,
    *,
    schedule: Schedule,
    mask_token_id: int,
) -> Corrupted:
    """Replace each maskable token by [MASK] with probability 1 - alpha(t), t being its block's time (BD3-LM)."""
    length = clean.shape[1]
    is_masked = is_maskable & (uniform < times.spread(1 - schedule.alpha(times.t), length))
    total = (times.spread(times.t, length) * is_maskable).sum(-1)
    return Corrupted(
        clean.masked_fill(is_masked, mask_token_id), is_masked, total / is_maskable.sum(-1).clamp_min(1), times
    )


def positions_of(is_chosen: PositionSet, count: int | None = None) -> Positions:
    """Return the row-major positions [N] of a set. Waits for the device to learn N, unless it is given as `count`."""
    if count is None:
        return is_chosen.flatten().nonzero().squeeze(1)
    return (~is_chosen).flatten().to(torch.uint8).argsort(stable=True)[:count]
