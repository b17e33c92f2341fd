"""Keys and values of a canvas that is decoded piece by piece: computed once, attended to by later passes.

B rows of a canvas   T its columns   R rows of one pass   W columns of one pass
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from memdlm.models.blocks.masks import Segments


@final
class KeyValueCache:
    """Room for every layer's keys and values of a canvas [B, T], filled by `CachedPass`."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (key, value) buffers [B, H, T + 1, P] of a layer.

        The last column is never read. Values that must not be kept are written there.
        """
        if layer not in self._layers:
            shape = (self.batch, like.shape[1], self.length + 1, like.shape[3])
            # Zeros, not uninitialised memory: a masked NaN would still reach the output as 0 * NaN.
            self._layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[layer]

    def buffers(self) -> Iterator[Tensor]:
        """Yield all buffers that there are so far."""
        for pair in self._layers.values():
            yield from pair

    def grow(self, length: int) -> None:
        """Make room for `length` columns."""
        for layer, pair in self._layers.items():
            wider = tuple(each.new_zeros(*each.shape[:2], length + 1, each.shape[3]) for each in pair)
            for new, old in zip(wider, pair, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._layers[layer] = (wider[0], wider[1])
        self.length = length

    def forget(self) -> None:
        """Let go of all buffers."""
        self._layers.clear()

    def clear(self, row: int) -> None:
        """Make a row as it was at the beginning: NaN of an earlier text must not reach another's output."""
        for buffer in self.buffers():
            buffer[row].zero_()

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to `target`."""
        for buffer in self.buffers():
            buffer[target] = buffer[source]

    def held(self, layer: int, row: int, end: int) -> tuple[Tensor, Tensor]:
        """Return a copy of the first `end` keys and values of a row, [H, end, P]."""
        key, value = self._layers[layer]
        return key[row, :, :end].clone(), value[row, :, :end].clone()


@final
@dataclass(frozen=True, slots=True)
class CachedPass:
    """One pass over some columns of some rows: it replaces their keys and values and attends to the first `end`."""

    cache: KeyValueCache
    rows: slice | Tensor
    """Which of the B rows the R rows of the pass are, ascending; a slice costs no copy."""
    columns: Tensor
    """[R, W] int64, which column each of the pass's positions is; `cache.length` for those that are padding."""
    start: int | None
    """The first column, if the columns are the same consecutive ones in all rows; None: they are not."""
    end: int
    is_visible: Tensor | Segments | None
    """[R or 1, 1, W, end] bool, true where a position of the pass may see a column; None: everywhere."""

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pass's `key` and `value` [R, H, W, P]; return what it attends to, [R, H, end, P]."""
        found = []
        for buffer, new in zip(self.cache.of(layer, key), (key, value), strict=True):
            if self.start is not None:
                buffer[self.rows, :, self.start : self.start + new.shape[2]] = new
            else:
                buffer.transpose(1, 2)[self._row_index(new.device), self.columns] = new.transpose(1, 2)
            found.append(buffer[self.rows, :, : self.end])
        return found[0], found[1]

    def static(self) -> "CachedPass":
        """Return the same pass, with shapes that do not depend on which columns it takes or how many it sees."""
        length, device = self.cache.length, self.columns.device
        if self.is_visible is None:
            is_visible = (torch.arange(length, device=device) < self.end)[None, None, None]
        else:
            seen = self.is_visible.whole(device) if isinstance(self.is_visible, Segments) else self.is_visible
            is_visible = torch.nn.functional.pad(seen, (0, length - self.end))
        return CachedPass(self.cache, self.rows, self.columns, None, length, is_visible)

    def _row_index(self, device: torch.device) -> Tensor:
        every = torch.arange(self.cache.batch, device=device)
        return every[self.rows][:, None]


@final
@dataclass(frozen=True, slots=True)
class PrefixCachedPass:
    """One pass behind a prefix that all rows share: it attends to the prefix and itself, and keeps nothing."""

    prefix: KeyValueCache
    """A cache of one row, [1, prefix.length], with every column filled."""
    columns: Tensor
    """[1, W] int64, from `prefix.length` on."""
    is_visible: Tensor | None
    """[1, 1, W, prefix.length + W] bool, as in `CachedPass`."""

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prefix's keys and values with `key` and `value` [R, H, W, P] behind them."""
        first, second = (
            torch.cat((held[:, :, : self.prefix.length].expand(len(new), -1, -1, -1), new), dim=2)
            for held, new in zip(self.prefix.of(layer, key), (key, value), strict=True)
        )
        return first, second


Cached: TypeAlias = CachedPass | PrefixCachedPass
"""What a pass over some columns attends to in addition to them."""


def at(x: Tensor, places: Tensor | None) -> Tensor:
    """Return `x` [R, W, D] at `places` [R, n]: [R, n, D]; None: all of it."""
    return x if places is None else x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def rows_at(x: Tensor, places: Tensor | None) -> Tensor:
    """Return `x` [R or 1, H, W or 1, K] at `places` [R, n] of its third dimension."""
    if places is None or x.shape[2] == 1:
        return x
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.expand(places.shape[0], -1, -1, -1).gather(2, index)
