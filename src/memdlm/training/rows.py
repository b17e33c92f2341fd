"""Numbered rows, and the order in which they are visited, which depends on seed and epoch alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from memdlm.diffusion.masking import before_targets
from memdlm.errors import DataError
from memdlm.randomness import derive
from memdlm.types import IGNORE_INDEX, PositionSet

SAMPLE = "sample"
"""Batch entry: a tuple of the rows' numbers in their dataset; no tensor, so reading it waits for no device."""
PROMPT_WIDTH = "prompt_width"
"""Batch entry: the number of columns that hold prompts, see `prompt_width`; on the host, like SAMPLE."""
FIRST_TARGET = "first_target"
"""Batch entry: the number of columns before the first target of any row; on the host, like SAMPLE."""
WITH_CONTEXT = "with_context"
"""Batch entry: a tuple of the places of the rows that have a context; on the host, like SAMPLE."""
POOL = 50
"""Number of batches sorted by length together: larger pools pad less and shuffle less."""


@final
class Numbered(Dataset[Any]):
    """A dataset that gives each row with its number."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """Return (number, row)."""
        return index, self.rows[index]


@final
class NumberedCollator:
    """Collates rows, numbered or not; the numbers become the batch's SAMPLE."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        """Return the batch of the rows."""
        if not isinstance(features[0], tuple):
            return self.collate(list(features))
        numbers, rows = zip(*features, strict=True)
        batch = self.collate(list(rows))
        width = prompt_width(batch["labels"], batch.get("attention_mask"), batch.get("is_padding"))
        more = {SAMPLE: numbers, PROMPT_WIDTH: width, FIRST_TARGET: first_target(batch["labels"])}
        if "is_context" in batch:
            more[WITH_CONTEXT] = tuple(batch["is_context"].any(1).nonzero().flatten().tolist())
        return {**batch, **more}


def prompt_columns(labels: Tensor, attention_mask: Tensor | None, is_padding: PositionSet | None) -> PositionSet:
    """Return [B, L], true at the tokens before a row's first target that are neither hidden nor padding."""
    is_prompt = before_targets(labels != IGNORE_INDEX, attention_mask)
    return is_prompt if is_padding is None else is_prompt & ~is_padding


def prompt_width(labels: Tensor, attention_mask: Tensor | None, is_padding: PositionSet | None) -> int:
    """Return the number of columns up to the last prompt's end, at least 1. Waits for the tensors' device, if any."""
    is_prompt = prompt_columns(labels, attention_mask, is_padding)
    return max(1, int((is_prompt * torch.arange(1, labels.shape[1] + 1, device=labels.device)).max()))


def first_target(labels: Tensor) -> int:
    """Return the number of columns before the first target of any row. Waits for the tensor's device, if any."""
    is_target = (labels != IGNORE_INDEX).any(0)
    return int(is_target.int().argmax()) if bool(is_target.any()) else labels.shape[1]


@final
class EpochSampler(Sampler[int]):
    """A permutation of the rows per epoch, the same on every rank and after an interruption.

    With `lengths`, rows of similar length are neighbours: the permutation is cut into pools of POOL batches, each
    sorted by length, and the batches of a pool are shuffled. The very first batch is the longest of all, so that a run
    that does not fit in memory fails at once. `batch` is the number of rows of an optimizer step.
    """

    def __init__(self, count: int, seed: int, *, lengths: Sequence[int] | None = None, batch: int = 1) -> None:
        self.count, self.seed, self.lengths, self.batch = count, seed, lengths, batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = derive(self.seed, "order", self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        return iter(order if self.lengths is None else self._grouped(order, self.lengths, generator))

    def _grouped(self, order: list[int], lengths: Sequence[int], generator: torch.Generator) -> list[int]:
        pool, batch = self.batch * POOL, self.batch
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda row: -lengths[row])
            cut = [rows[place : place + batch] for place in range(0, len(rows), batch)]
            batches += [cut[place] for place in torch.randperm(len(cut), generator=generator).tolist()]
        # The one short batch must stay last; otherwise all batches after it would be cut at other rows.
        batches.sort(key=lambda rows: len(rows) < batch)
        full = len(batches) - (len(batches[-1]) < batch) if batches else 0
        if full > 1:
            longest = max(range(full), key=lambda place: lengths[batches[place][0]])
            batches[0], batches[longest] = batches[longest], batches[0]
        return [row for rows in batches for row in rows]


def require_context(rows: Any) -> None:
    """Raise DataError if none of `rows` has a context, so that no memory would ever be written."""
    for index in range(len(rows)):
        context = rows[index].get("context_ids")
        if context is not None and len(context) > 0:
            return
    raise DataError(
        f"mem_write_source=context, but none of the {len(rows)} rows to train on has a text to write: name its column "
        "with context_column, or add its tokens to some rows as `context_ids`; or train without memory."
    )


def lengths_of(rows: Any, column: str) -> list[int]:
    """Return the lengths of all rows, from `rows.lengths` or a stored `column` if there is one, else counted."""
    known = getattr(rows, "lengths", None)
    if known is None and column in (getattr(rows, "column_names", None) or ()):
        known = rows[column][:]
    return [len(row["input_ids"]) for row in rows] if known is None else list(known)
