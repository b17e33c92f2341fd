"""Which position may look at which: the one mask contract that training, scoring, writing and decoding share.

A network here never infers causality. It is told three things, and they are intersected:

* the pattern, an explicit object: `Full()`, `BlockCausal(block)` or `SlidingWindow(reach)`;
* `attention_mask`: None; 2-D bool or 0/1 integers, true where a position may be seen; 4-D bool
  [B or 1, heads or 1, L, L], true where query (row) may see key (column); or 4-D float, added to the scores;
* the network's own sliding window, if it has one.

Anything else raises: a wrong guess would make a padded batch causal without a warning.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from memdlm.errors import ConfigError
from memdlm.options import shortened


class AttentionPattern(ABC):
    """Which positions may see which, before padding is excluded."""

    @abstractmethod
    def allowed(self, length: int, device: torch.device) -> Tensor | None:
        """Return [L, L] bool, true where query i may see key j, or None when everything may be seen."""


@final
@dataclass(frozen=True, slots=True)
class Full(AttentionPattern):
    """Every position sees every other: LLaDA, LLaDA-MoE, and writes as published."""

    def allowed(self, length: int, device: torch.device) -> Tensor | None:
        """Return None: no restriction."""
        return None


@final
@dataclass(frozen=True, slots=True)
class BlockCausal(AttentionPattern):
    """A position sees its own block and all earlier ones; blocks start at column 0 (LLaDA2.x decoding)."""

    block: int

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or not 1 <= self.block < 2**31:
            raise ConfigError(f"BlockCausal.block must be an integer of at least 1, got {shortened(self.block)}.")

    def allowed(self, length: int, device: torch.device) -> Tensor | None:
        """Return the lower block triangle."""
        block = torch.arange(length, device=device) // self.block
        return block[None, :] <= block[:, None]


@final
@dataclass(frozen=True, slots=True)
class SlidingWindow(AttentionPattern):
    """A position sees those at most `reach` away; what lies further must be remembered by other means."""

    reach: int

    def __post_init__(self) -> None:
        if isinstance(self.reach, bool) or not isinstance(self.reach, int) or not 0 <= self.reach < 2**31:
            raise ConfigError(f"SlidingWindow.reach must be an integer of at least 0, got {shortened(self.reach)}.")

    def allowed(self, length: int, device: torch.device) -> Tensor:
        """Return a band along the diagonal."""
        place = torch.arange(length, device=device)
        return (place[:, None] - place[None, :]).abs() <= self.reach


SEGMENT = 512
"""Columns whose queries attend together when a block-causal mask is not formed whole."""


@final
@dataclass(frozen=True, slots=True)
class Segments:
    """A block-causal mask for `width` queries, the columns from `first` on, that see keys 0 .. end - 1.

    It is not formed whole. The queries are taken in segments, and each segment sees the keys up to the end of its last
    block. Keys beyond that are neither computed nor masked.
    """

    block: int
    first: int
    width: int
    end: int
    is_visible: Tensor | None = None
    """[B, 1, 1, end] bool, true where a key is not padding; None: everywhere."""

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Yield (queries of a segment, keys that some of them see)."""
        for start in range(0, self.width, SEGMENT):
            stop = min(start + SEGMENT, self.width)
            last = self.first + stop
            yield slice(start, stop), slice(0, min(self.end, -(-last // self.block) * self.block))

    def of(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """Return [B or 1, 1, n, m] bool for queries and keys of a part."""
        column = torch.arange(self.first + queries.start, self.first + queries.stop, device=device)
        return self._seen(column, keys.stop, device)[None, None] & self._visible(keys)

    def rows(self, queries: Tensor) -> Tensor:
        """Return [R, 1, n, end] bool for the queries [R, n]."""
        return self._seen(self.first + queries, self.end, queries.device)[:, None] & self._visible(slice(0, self.end))

    def whole(self, device: torch.device) -> Tensor:
        """Return [B or 1, 1, width, end] bool: all of it."""
        return self.of(slice(0, self.width), slice(0, self.end), device)

    def _seen(self, column: Tensor, end: int, device: torch.device) -> Tensor:
        keys = torch.arange(end, device=device)
        return (keys // self.block) <= (column[..., None] // self.block)

    def _visible(self, keys: slice) -> Tensor | bool:
        return True if self.is_visible is None else self.is_visible[..., keys]


def segments_for(attention_mask: Tensor | None, hidden: Tensor, pattern: AttentionPattern) -> Segments | None:
    """Return the mask of a block-causal pass over `hidden` [B, L, D] in segments; None if it is to be formed whole.

    It is formed whole where it is small, for other patterns, and for an `attention_mask` that is not 2-D.
    """
    batch, length = hidden.shape[:2]
    if not isinstance(pattern, BlockCausal) or length <= SEGMENT:
        return None
    if attention_mask is None:
        return Segments(pattern.block, 0, length, length)
    if attention_mask.dim() != 2:
        return None
    is_visible, is_bias = _as_four_dimensional(attention_mask, batch, length)
    return None if is_bias else Segments(pattern.block, 0, length, length, is_visible)


def visible_tokens(attention_mask: Tensor | None) -> Tensor | None:
    """Return which tokens `attention_mask` shows, [B, L] bool, or None when there is none or it is 4-D."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask.bool()


def attention_scores_mask(
    attention_mask: Tensor | None,
    hidden: Tensor,
    *,
    pattern: AttentionPattern,
    sliding_window: int | None = None,
    additive: bool = False,
) -> Tensor | None:
    """Combine pattern, mask and sliding window into what the attention function takes.

    `hidden` [B, L, D] gives sizes, device and dtype. `sliding_window` w lets i see j only where
    |i - j| <= w. Returns None (no restriction), a bool [B or 1, heads or 1, 1 or L, L], or, if `additive` or if a float
    mask came in, a tensor of `hidden.dtype` to add to the scores. Raises ConfigError for any other form or size.
    """
    batch, length = hidden.shape[:2]
    if not isinstance(pattern, AttentionPattern):
        raise ConfigError(f"attention_pattern must be an AttentionPattern, such as Full(), got {shortened(pattern)}.")
    allowed = pattern.allowed(length, hidden.device)
    if sliding_window is not None:
        near = SlidingWindow(sliding_window).allowed(length, hidden.device)
        allowed = near if allowed is None else allowed & near
    if allowed is not None:
        allowed = allowed[None, None]
    bias = None
    if attention_mask is not None:
        given, is_bias = _as_four_dimensional(attention_mask, batch, length)
        if is_bias:
            # Lowest instead of -inf: a row that may see nothing then averages all instead of being 0 / 0.
            bias = given.to(hidden.dtype).clamp(min=torch.finfo(hidden.dtype).min)
        else:
            allowed = given if allowed is None else allowed & given
    if allowed is None:
        return bias
    if bias is None and not additive:
        return allowed
    lowest = torch.finfo(hidden.dtype).min
    if bias is None:
        bias = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(allowed, bias, lowest)


def _as_four_dimensional(mask: Tensor, batch: int, length: int) -> tuple[Tensor, bool]:
    if mask.dim() == 2 and not mask.is_floating_point() and not mask.is_complex():
        if tuple(mask.shape) != (batch, length):
            raise ConfigError(
                f"attention_mask has shape {tuple(mask.shape)}; the ids are {(batch, length)}. "
                "A 2-D mask has one entry per token."
            )
        return mask.bool()[:, None, None, :], False
    if mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        fits = mask.shape[0] in (1, batch) and mask.shape[2] in (1, length) and mask.shape[3] == length
        if not fits:
            raise ConfigError(
                f"attention_mask has shape {tuple(mask.shape)}; expected [{batch} or 1, heads or 1, "
                f"{length}, {length}]."
            )
        return mask, mask.is_floating_point()
    raise ConfigError(
        f"attention_mask with {mask.dim()} dimensions and dtype {mask.dtype} is ambiguous. Possible: None, 2-D "
        "bool or 0/1 integers (1 = may be seen), 4-D bool (true = may be seen), 4-D float (added to scores)."
    )
