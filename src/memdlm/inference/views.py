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

    def __init__(self, lengths: Tensor, block: int) -> None:
        self.lengths, self.block = lengths, block

    def plan(self, asked: Asked) -> Pass:
        """Take the columns up to the block's end."""
        last = ((asked.per_row("amax") // self.block + 1) * self.block).minimum(self.lengths[asked.rows])
        return Pass(torch.zeros_like(last), last)


@final
class FinishedBlocks(View):
    """Keys and values of finished blocks are kept: exact for a block-causal pattern.

    There, later tokens cannot change them. The first pass over a block also takes what was finished just before it: the
    prompt at first, then one block each.
    """

    def __init__(self, lengths: Tensor, block: int, length: int) -> None:
        self.lengths, self.blocks = lengths, torch.full_like(lengths, block)
        self.cache = KeyValueCache(lengths.numel(), length)
        self._kept = torch.zeros_like(lengths)

    def admit(self, row: int, block: int) -> None:
        """Begin anew in a row: another text, in blocks of `block` tokens, takes it. Its length was set."""
        self.blocks[row], self._kept[row] = block, 0
        self.cache.clear(row)

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to `target`. Its length was set."""
        self.blocks[target], self._kept[target] = self.blocks[source], self._kept[source]
        self.cache.move(source, target)

    def skip(self, rows: Tensor, lengths: Tensor) -> None:
        """Note that the cache holds the first `lengths` [R] columns of `rows` [R]."""
        self._kept[rows] = lengths

    def plan(self, asked: Asked) -> Pass:
        """Take the columns that are not kept, up to the block's end."""
        block = self.blocks[asked.rows]
        last = ((asked.per_row("amax") // block + 1) * block).minimum(self.lengths[asked.rows])
        return Pass(self._kept[asked.rows], last)

    def cached(self, rows: Tensor, part: Pass, device: torch.device) -> CachedPass:
        """Let every column see its own block and those before it."""
        columns, end, blocks = part.columns, int(part.last.max()), self.blocks[rows]
        is_alike = bool((blocks == blocks[0]).all())
        visible: Tensor | Segments | None = None
        if part.start is not None and is_alike and part.width > SEGMENT:
            visible = Segments(int(blocks[0]), part.start, part.width, end)
        elif part.start is None or part.width > int(blocks.min()):
            own = columns if part.start is None else columns[:1]
            block = blocks[:1] if is_alike else blocks
            block = block.to(device, non_blocking=True)[:, None, None]
            seen = torch.arange(end, device=device)
            earlier = (seen // block) <= (own.to(device, non_blocking=True)[:, :, None] // block)
            if part.start is None:
                earlier &= seen < part.last.to(device, non_blocking=True)[:, None, None]
            visible = earlier[:, None]
        return _cached_pass(self.cache, rows, part, end, visible, device)

    def done(self, asked: Asked, part: Pass) -> None:
        """Keep all blocks but the current one."""
        block = self.blocks[asked.rows]
        self._kept[asked.rows] = asked.per_row("amax") // block * block


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
