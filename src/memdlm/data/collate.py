"""Collate encoded rows into padded batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from memdlm.errors import DataError, unknown
from memdlm.padding import right_padded
from memdlm.types import IGNORE_INDEX

SUPERVISE_PADDING = ("all", "first", "none", "block")


@final
@dataclass(frozen=True, slots=True)
class Collator:
    """Right-pad rows to the longest.

    Diffusion models learn to end a response from EOS padding. `supervise_padding` says how much is learned:

    * all (as published): padding is visible and learned, so its amount depends on the rows that share a batch;
    * first: one EOS after the row is visible and learned, the rest is hidden;
    * none: all padding is hidden;
    * block: a row's last block of `block_size` tokens is filled with EOS that is visible and learned, the rest is
      hidden (block diffusion: the model learns to end a block with EOS, whatever rows share the batch).

    The batch has `input_ids`, `labels` [B, L] int64, `is_padding` [B, L] bool (true at padding added here, never at
    the row's own EOS) and, unless everything is visible, `attention_mask` [B, L] int64. Rows with `context_ids` (what
    `mem_write_source=context` writes) add `context_ids` [B, C] int64, right-padded, and `is_context` [B, C] bool; C is
    at least 1. The context of a row may be empty: it is trained without memory.
    """

    pad_token_id: int
    supervise_padding: str = "all"
    pad_to_multiple_of: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.supervise_padding not in SUPERVISE_PADDING:
            raise DataError(unknown("supervise_padding:", self.supervise_padding, SUPERVISE_PADDING))
        if self.supervise_padding == "block" and (self.block_size is None or self.block_size < 1):
            raise DataError(
                f"supervise_padding='block' needs block_size, the tokens of a block, got {self.block_size}; set it, or "
                "choose another of " + ", ".join(SUPERVISE_PADDING) + "."
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows with `input_ids` and `labels`; raises DataError if some but not all have `context_ids`."""
        ids, lengths = right_padded((row["input_ids"] for row in features), self.pad_token_id)
        labels, labelled = right_padded((row["labels"] for row in features), IGNORE_INDEX)
        if not lengths.equal(labelled):
            raise DataError("the rows of a batch need one label per token: input_ids and labels differ in length.")
        width = int(self._reach(lengths).max())
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids, labels = (
            nn.functional.pad(each, (0, width - each.shape[1]), value=value)
            for each, value in ((ids, self.pad_token_id), (labels, IGNORE_INDEX))
        )
        column, length = torch.arange(width), lengths[:, None]
        is_padding = column >= length
        batch = {"input_ids": ids, "labels": labels, "is_padding": is_padding, **self._contexts(features)}
        if self.supervise_padding == "all":
            labels[is_padding] = self.pad_token_id
            return batch
        reach = self._reach(length)
        labels[is_padding & (column < reach)] = self.pad_token_id
        return {**batch, "attention_mask": (column < reach).long()}

    def _reach(self, lengths: Tensor) -> Tensor:
        """Return how far rows of these lengths are visible."""
        if self.supervise_padding == "block":
            assert self.block_size is not None
            return -(-lengths // self.block_size) * self.block_size
        return lengths + 1 if self.supervise_padding == "first" else lengths

    def _contexts(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        count = sum("context_ids" in row for row in features)
        if count == 0:
            return {}
        if count < len(features):
            raise DataError(
                f"context_ids: {count} of the {len(features)} rows of a batch have `context_ids`; give "
                "them to all (an empty list to a row that is trained without memory), or to none."
            )
        # `datasets` fills in None where rows are joined and some have no such column.
        ids, lengths = right_padded(
            (() if row["context_ids"] is None else row["context_ids"] for row in features), self.pad_token_id
        )
        ids = nn.functional.pad(ids, (0, max(0, 1 - ids.shape[1])), value=self.pad_token_id)
        return {"context_ids": ids, "is_context": torch.arange(ids.shape[1]) < lengths[:, None]}
