"""Which position may look at which: the one mask contract that training, scoring, writing and decoding share.

A network here never infers causality. It is told three things, and they are intersected:

* the pattern, an explicit object: `Full()`, `BlockCausal(block)`, `BlockDiffusion(block)` or `SlidingWindow(reach)`;
* `attention_mask`: None; 2-D bool or 0/1 integers, true where a position may be seen; 4-D bool
  [B or 1, heads or 1, L, L], true where query (row) may see key (column); or 4-D float, added to the scores;
* the network's own sliding window, if it has one.

Anything else raises: a wrong guess would make a padded batch causal without a warning.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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

    def places(self, length: int, device: torch.device) -> Tensor:
        """Return [1, L] int64: the positions that the columns of a pass stand for, unless the caller gives others."""
        return torch.arange(length, device=device)[None]


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
        _check_block("BlockCausal", self.block)

    def allowed(self, length: int, device: torch.device) -> Tensor | None:
        """Return the lower block triangle."""
        block = torch.arange(length, device=device) // self.block
        return block[None, :] <= block[:, None]


@final
@dataclass(frozen=True, slots=True)
class BlockDiffusion(AttentionPattern):
    """A noised text and the clean one in one pass, the columns [x_t | x_0] (BD3-LM, arXiv 2503.09573).

        query \\ key   x_t           x_0
        x_t           own block     earlier blocks
        x_0           never         own and earlier blocks

    So each noised block is predicted exactly as in decoding, after clean blocks, and all blocks of a text in one pass.
    Blocks start at column 0 of the text. The noised part may begin at column `start` of the text, the start of a block:
    no other block sees what is left out. Positions are the columns of the text.
    """

    block: int
    start: int = 0

    def __post_init__(self) -> None:
        _check_block("BlockDiffusion", self.block)
        if self.start % self.block:
            raise ConfigError(f"BlockDiffusion.start {self.start} is not the start of a block of {self.block} tokens.")

    def allowed(self, length: int, device: torch.device) -> Tensor:
        """Return the four parts of the table; raises ConfigError when `length` is no pair of texts."""
        column = torch.arange(length, device=device)
        return self.sees(column[:, None], column[None, :], self.noised(length))

    def places(self, length: int, device: torch.device) -> Tensor:
        """Return start..L-1, 0..L-1."""
        noised = self.noised(length)
        return self._text(torch.arange(length, device=device), noised)[None]

    def noised(self, length: int) -> int:
        """Return the width of the noised part, L - start, of a pass over `length` = 2 L - start columns."""
        noised, rest = divmod(length - self.start, 2)
        if rest or noised < 1:
            raise ConfigError(
                f"BlockDiffusion takes a noised text from column {self.start} on, and the clean text behind it; "
                f"{length} columns are no such pair."
            )
        return noised

    def sees(self, query: Tensor, key: Tensor, noised: int) -> Tensor:
        """Return which `query` columns see which `key` columns; the two are broadcast."""
        from_clean, to_clean = query >= noised, key >= noised
        asking, asked = (self._text(each, noised) // self.block for each in (query, key))
        return torch.where(
            to_clean, torch.where(from_clean, asked <= asking, asked < asking), ~from_clean & (asked == asking)
        )

    def _text(self, column: Tensor, noised: int) -> Tensor:
        """Return the columns of the text that columns of the pass are."""
        return torch.where(column >= noised, column - noised, column + self.start)


def _check_block(name: str, block: object) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block < 2**31:
        raise ConfigError(f"{name}.block must be an integer of at least 1, got {shortened(block)}.")


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
"""Columns whose queries attend together when a mask is not formed whole."""


class Segmented(ABC):
    """A mask that is not formed whole: the queries attend segment by segment, each to the keys that it can see."""

    @abstractmethod
    def parts(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Yield (queries of a segment, ascending ranges of the keys that some of them see), in the queries' order."""

    @abstractmethod
    def of(self, queries: slice, keys: Sequence[slice], device: torch.device) -> Tensor:
        """Return [B or 1, 1, n, m] bool for queries and keys of a part."""

    @abstractmethod
    def rows(self, queries: Tensor) -> Tensor:
        """Return [R, 1, n, keys] bool for the queries [R, n]."""

    @abstractmethod
    def whole(self, device: torch.device) -> Tensor:
        """Return [B or 1, 1, queries, keys] bool: all of it."""


def columns_of(x: Tensor, ranges: Sequence[slice]) -> Tensor:
    """Return the columns of `x` [..., L, P] in `ranges`, one after the other."""
    return x[..., ranges[0], :] if len(ranges) == 1 else torch.cat([x[..., each, :] for each in ranges], dim=-2)


@final
@dataclass(frozen=True, slots=True)
class Segments(Segmented):
    """A block-causal mask for `width` queries, the columns from `first` on, that see keys 0 .. end - 1.

    Each segment sees the keys up to the end of its last block. Keys beyond that are neither computed nor masked.
    """

    block: int
    first: int
    width: int
    end: int
    is_visible: Tensor | None = None
    """[B, 1, 1, end] bool, true where a key is not padding; None: everywhere."""

    def parts(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Yield the segments."""
        for start in range(0, self.width, SEGMENT):
            stop = min(start + SEGMENT, self.width)
            last = self.first + stop
            yield slice(start, stop), (slice(0, min(self.end, -(-last // self.block) * self.block)),)

    def of(self, queries: slice, keys: Sequence[slice], device: torch.device) -> Tensor:
        """Return the mask of a part."""
        column = torch.arange(self.first + queries.start, self.first + queries.stop, device=device)
        return self._seen(column, keys[0].stop, device)[None, None] & self._visible(keys[0])

    def rows(self, queries: Tensor) -> Tensor:
        """Return the mask of some queries of each row."""
        return self._seen(self.first + queries, self.end, queries.device)[:, None] & self._visible(slice(0, self.end))

    def whole(self, device: torch.device) -> Tensor:
        """Return all of it."""
        return self.of(slice(0, self.width), (slice(0, self.end),), device)

    def _seen(self, column: Tensor, end: int, device: torch.device) -> Tensor:
        keys = torch.arange(end, device=device)
        return (keys // self.block) <= (column[..., None] // self.block)

    def _visible(self, keys: slice) -> Tensor | bool:
        return True if self.is_visible is None else self.is_visible[..., keys]


@final
@dataclass(frozen=True, slots=True)
class DiffusionSegments(Segmented):
    """The mask of `BlockDiffusion` over a noised part of `noised` columns and a clean text.

    A segment of x_t sees its own blocks of x_t and x_0 up to its last block; a segment of x_0 sees x_0 to the end of
    its last block. Of a long text, little more than a quarter of the 2L * 2L scores is computed.
    """

    pattern: BlockDiffusion
    noised: int
    is_visible: Tensor | None = None
    """[B, 1, 1, keys] bool, true where a key is not padding; None: everywhere."""

    def parts(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Yield the segments of x_t, then those of x_0."""
        block, behind, first = self.pattern.block, self.noised, self.pattern.start
        length = behind + first
        for is_clean, begin in ((False, first), (True, 0)):
            for start in range(begin, length, SEGMENT):
                stop = min(start + SEGMENT, length)
                own, last = start // block * block, (stop - 1) // block * block
                end = min(length, last + block)
                if is_clean:
                    yield slice(behind + start, behind + stop), (slice(behind, behind + end),)
                else:
                    before = (slice(behind, behind + last),) if last else ()
                    yield slice(start - first, stop - first), (slice(own - first, end - first), *before)

    def of(self, queries: slice, keys: Sequence[slice], device: torch.device) -> Tensor:
        """Return the mask of a part."""
        column, key = (
            torch.cat([torch.arange(each.start, each.stop, device=device) for each in ranges])
            for ranges in ((queries,), keys)
        )
        seen = self.pattern.sees(column[:, None], key[None, :], self.noised)[None, None]
        if self.is_visible is None:
            return seen
        return seen & torch.cat([self.is_visible[..., each] for each in keys], dim=-1)

    def rows(self, queries: Tensor) -> Tensor:
        """Return the mask of some queries of each row."""
        key = torch.arange(self._width, device=queries.device)
        seen = self.pattern.sees(queries[..., None], key, self.noised)[:, None]
        return seen if self.is_visible is None else seen & self.is_visible

    def whole(self, device: torch.device) -> Tensor:
        """Return all of it."""
        every = slice(0, self._width)
        return self.of(every, (every,), device)

    @property
    def _width(self) -> int:
        return 2 * self.noised + self.pattern.start


def segments_for(attention_mask: Tensor | None, hidden: Tensor, pattern: AttentionPattern) -> Segmented | None:
    """Return the mask of a pass over `hidden` [B, L, D] in segments; None if it is to be formed whole.

    It is formed whole where it is small, for patterns other than `BlockCausal` and `BlockDiffusion`, and for an
    `attention_mask` that is not 2-D.
    """
    batch, length = hidden.shape[:2]
    if not isinstance(pattern, BlockCausal | BlockDiffusion) or length <= SEGMENT:
        return None
    is_visible = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            return None
        is_visible, is_bias = _as_four_dimensional(attention_mask, batch, length)
        if is_bias:
            return None
    if isinstance(pattern, BlockDiffusion):
        return DiffusionSegments(pattern, pattern.noised(length), is_visible)
    return Segments(pattern.block, 0, length, length, is_visible)


def visible_tokens(attention_mask: Tensor | None) -> Tensor | None:
    """Return which tokens `attention_mask` shows, [B or 1, L] bool, or None when there is none or it is a bias.

    A 4-D mask shows what it lets some position see.
    """
    if attention_mask is None or (attention_mask.dim() == 4 and attention_mask.dtype is not torch.bool):
        return None
    return attention_mask.any(dim=(1, 2)) if attention_mask.dim() == 4 else attention_mask.bool()


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
