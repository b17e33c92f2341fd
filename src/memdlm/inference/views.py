"""Which columns of a canvas a decoding pass recomputes, and which of the others it attends to.

B rows of a canvas   T its columns   R rows of one pass   W columns of one pass   N asked positions
Bookkeeping lives on the CPU: a step starts by learning its positions from the device anyway.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from memdlm.models.blocks.key_values import CachedPass, KeyValueCache
from memdlm.models.blocks.masks import SEGMENT, Segments
from memdlm.types import Positions


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """The positions a step predicts, row by row."""

    rows: Tensor
    """[R] the canvas rows they lie in, ascending."""
    row_of: Tensor
    """[N] index into `rows`."""
    place_of: Tensor
    """[N] how many asked positions of the same row come before."""
    columns: Tensor
    """[N] the asked columns."""

    @classmethod
    def of(cls, positions: Positions, length: int, *, right_shift: bool = False) -> "Asked":
        """Group `positions` of a canvas with `length` columns by row; `right_shift` asks one column earlier."""
        flat = positions.cpu()
        rows, row_of, counts = (flat // length).unique_consecutive(return_inverse=True, return_counts=True)
        place_of = torch.arange(flat.numel()) - (counts.cumsum(0) - counts)[row_of]
        columns = flat % length
        return cls(rows, row_of, place_of, (columns - 1).clamp_min(0) if right_shift else columns)

    def per_row(self, reduce: str) -> Tensor:
        """Return [R]: the first ("amin") or last ("amax") asked column of every row."""
        start = torch.zeros(self.rows.numel(), dtype=torch.int64)
        return start.scatter_reduce(0, self.row_of, self.columns, reduce, include_self=False)

    def queries(self, first: Tensor) -> tuple[Tensor, Positions]:
        """Return ([R, n] columns counted from `first` [R], [N] the asked positions in that grid)."""
        width = int(self.place_of.max()) + 1
        grid = torch.zeros(self.rows.numel(), width, dtype=torch.int64)
        grid[self.row_of, self.place_of] = self.columns - first[self.row_of]
        return grid, self.row_of * width + self.place_of


@final
@dataclass(frozen=True, slots=True)
class Pass:
    """The columns that one pass of the network takes: in every row, `first` [R] up to and without `last` [R]."""

    first: Tensor
    last: Tensor

    @property
    def width(self) -> int:
        """W, the most columns of a row."""
        return int((self.last - self.first).max())

    @property
    def columns(self) -> Tensor:
        """[R, W]; rows with fewer columns go on beyond their `last`."""
        return self.first[:, None] + torch.arange(self.width)

    @property
    def start(self) -> int | None:
        """The first column, if all rows take the same ones."""
        is_same = bool((self.first == self.first[0]).all() and (self.last == self.last[0]).all())
        return int(self.first[0]) if is_same else None


@final
@dataclass(frozen=True, slots=True)
class Blocks:
    """Where the blocks of a canvas lie: those of row i begin `offsets[i]` columns before multiples of `sizes[i]`."""

    sizes: Tensor
    """[B] int64 on the CPU."""
    offsets: Tensor
    """[B] int64 on the CPU, from 0 to the size - 1."""

    @classmethod
    def of_size(cls, size: int, offsets: Tensor) -> "Blocks":
        """Return blocks of one size for all rows; `offsets` is [B]."""
        return cls(torch.full_like(offsets, size), offsets)

    @classmethod
    def from_first(cls, size: int, rows: int) -> "Blocks":
        """Return blocks that are counted from the first column of every row."""
        return cls.of_size(size, torch.zeros(rows, dtype=torch.int64))

    def put(self, row: int, size: int, offset: int) -> None:
        """Give a row, which another text takes, its blocks."""
        self.sizes[row], self.offsets[row] = size, offset

    def are_plain(self, rows: Tensor) -> bool:
        """Whether the blocks of `rows` [R] are of one size and begin at its multiples."""
        sizes = self.sizes[rows]
        return bool((sizes == sizes[0]).all()) and not bool(self.offsets[rows].any())

    @property
    def are_shifted(self) -> bool:
        """Whether some blocks do not begin at multiples of their size."""
        return bool(self.offsets.any())

    def index(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the numbers of the blocks of `columns` [R, ...] in `rows` [R]."""
        shape = (-1, *[1] * (columns.dim() - 1))
        sizes, offsets = self.sizes[rows].view(shape), self.offsets[rows].view(shape)
        return torch.div(columns + offsets, sizes, rounding_mode="floor")

    def start(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return [R]: where the blocks of `columns` [R] begin."""
        return (self.index(rows, columns) * self.sizes[rows] - self.offsets[rows]).clamp_min(0)

    def end(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return [R]: the first column behind the blocks of `columns` [R]."""
        return (self.index(rows, columns) + 1) * self.sizes[rows] - self.offsets[rows]

    def seen(self, rows: Tensor, columns: Tensor, end: int, device: torch.device) -> Tensor:
        """Return [R, 1, W, end] bool on `device`: which of the first columns each of `columns` [R, W] may see."""
        own, keys = self.index(rows, columns), self.index(rows, torch.arange(end).expand(len(rows), -1))
        own, keys = (each.to(device, non_blocking=True) for each in (own, keys))
        return (keys[:, None] <= own[:, :, None])[:, None]


class View(ABC):
    """How much of a canvas is recomputed. Belongs to one canvas and one state of the network (one memory)."""

    @abstractmethod
    def plan(self, asked: Asked) -> Pass:
        """Return the pass that predicts the asked positions."""

    def cached(self, rows: Tensor, part: Pass, device: torch.device) -> CachedPass | None:
        """Return the kept columns that a pass over `rows` [R] also attends to; None if it needs none."""
        return None

    def done(self, asked: Asked, part: Pass) -> None:
        """Note that the pass has been made; a view that keeps nothing has nothing to note."""
        return None


@final
class WholeRows(View):
    """Every row from its first column to its end, in every pass: exact for any pattern."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def plan(self, asked: Asked) -> Pass:
        """Take whole rows."""
        last = self.lengths[asked.rows]
        return Pass(torch.zeros_like(last), last)


@final
class UpToBlock(View):
    """Every row up to the end of its current block, in every pass: exact for a block-causal pattern."""

    def __init__(self, lengths: Tensor, blocks: Blocks) -> None:
        self.lengths, self.blocks = lengths, blocks

    def plan(self, asked: Asked) -> Pass:
        """Take the columns up to the block's end."""
        last = self.blocks.end(asked.rows, asked.per_row("amax")).minimum(self.lengths[asked.rows])
        return Pass(torch.zeros_like(last), last)


@final
class FinishedBlocks(View):
    """Keys and values of finished blocks are kept: exact for a block-causal pattern.

    There, later tokens cannot change them. The first pass over a block also takes what was finished just before it: the
    prompt at first, then one block each. With shifted logits, the column before a block predicts its first token, so a
    block is recomputed until the first token of the next one is there.
    """

    def __init__(self, lengths: Tensor, blocks: Blocks, length: int) -> None:
        self.lengths, self.blocks = lengths, blocks
        self.cache = KeyValueCache(lengths.numel(), length)
        self._kept = torch.zeros_like(lengths)

    def admit(self, row: int, block: int, offset: int = 0) -> None:
        """Begin anew in a row: another text, in blocks of `block` tokens, takes it. Its length was set."""
        self.blocks.put(row, block, offset)
        self._kept[row] = 0
        self.cache.clear(row)

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to `target`. Its length was set."""
        self.blocks.put(target, int(self.blocks.sizes[source]), int(self.blocks.offsets[source]))
        self._kept[target] = self._kept[source]
        self.cache.move(source, target)

    def skip(self, rows: Tensor, lengths: Tensor) -> None:
        """Note that the cache holds the first `lengths` [R] columns of `rows` [R]."""
        self._kept[rows] = lengths

    def plan(self, asked: Asked) -> Pass:
        """Take the columns that are not kept, up to the block's end."""
        last = self.blocks.end(asked.rows, asked.per_row("amax")).minimum(self.lengths[asked.rows])
        return Pass(self._kept[asked.rows], last)

    def cached(self, rows: Tensor, part: Pass, device: torch.device) -> CachedPass:
        """Let every column see its own block and those before it."""
        columns, end = part.columns, int(part.last.max())
        is_even, is_plain = part.start is not None, self.blocks.are_plain(rows)
        is_one = bool((self.blocks.index(rows, part.first) == self.blocks.index(rows, part.last - 1)).all())
        visible: Tensor | Segments | None = None
        if part.start is not None and part.width > SEGMENT and is_plain:
            visible = Segments(int(self.blocks.sizes[rows[0]]), part.start, part.width, end)
        elif not is_even or not is_one:
            # Rows that take the same columns of the same blocks share a mask.
            alike = 1 if is_even and is_plain else len(rows)
            visible = self.blocks.seen(rows[:alike], columns[:alike], end, device)
            if not is_even:
                seen = torch.arange(end, device=device)
                visible &= (seen < part.last.to(device, non_blocking=True)[:, None])[:, None, None]
        return _cached_pass(self.cache, rows, part, end, visible, device)

    def done(self, asked: Asked, part: Pass) -> None:
        """Keep all blocks but the current one."""
        self._kept[asked.rows] = self.blocks.start(asked.rows, asked.per_row("amin"))


@final
class Approximate(View):
    """Keys and values of the whole row are kept, and refreshed at every new block and every `refresh` steps.

    With `refresh` None they are refreshed only at new blocks, as in Fast-dLLM (arXiv 2505.22618). In between, only the
    current block ("dual"), or all from its start on ("prefix"), is recomputed. This is not exact: in a bidirectional
    network the states of the other positions change a little with every token.
    """

    def __init__(self, lengths: Tensor, length: int, *, refresh: int | None, scope: str) -> None:
        self.lengths, self.refresh, self.scope = lengths, refresh, scope
        self.cache = KeyValueCache(lengths.numel(), length)
        self._first, self._last = torch.zeros_like(lengths), torch.zeros_like(lengths)
        self._age = 0

    def plan(self, asked: Asked) -> Pass:
        """Take whole rows when a block begins or the kept values are too old, else the block."""
        first, last = asked.per_row("amin"), asked.per_row("amax") + 1
        is_new = (first < self._first[asked.rows]) | (last > self._last[asked.rows])
        ends = self.lengths[asked.rows]
        is_old = self.refresh is not None and self._age >= self.refresh
        if is_old or bool(is_new.any()):
            self._first[asked.rows] = torch.where(is_new, first, self._first[asked.rows])
            self._last[asked.rows] = torch.where(is_new, last, self._last[asked.rows])
            self._age = 0
            return Pass(torch.zeros_like(ends), ends)
        return Pass(self._first[asked.rows], ends if self.scope == "prefix" else self._last[asked.rows])

    def cached(self, rows: Tensor, part: Pass, device: torch.device) -> CachedPass:
        """Let every column see the whole row."""
        ends = self.lengths[rows]
        end = int(ends.max())
        is_even = bool((ends == end).all())
        visible = None
        if not is_even:
            visible = (torch.arange(end, device=device) < ends.to(device, non_blocking=True)[:, None])[:, None, None, :]
        return _cached_pass(self.cache, rows, part, end, visible, device)

    def done(self, asked: Asked, part: Pass) -> None:
        """Count the age of the kept values."""
        self._age += 1


def _cached_pass(
    cache: KeyValueCache, rows: Tensor, part: Pass, end: int, visible: Tensor | Segments | None, device: torch.device
) -> CachedPass:
    columns = part.columns
    columns = columns.where(columns < part.last[:, None], torch.tensor(cache.length))
    return CachedPass(cache, contiguous(rows, device), columns.to(device, non_blocking=True), part.start, end, visible)


def contiguous(rows: Tensor, device: torch.device) -> slice | Tensor:
    """Return `rows` [R] as a slice if they follow each other, else as an index on `device`."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == rows.numel() else rows.to(device, non_blocking=True)
