"""Encoded conversations as padded batches whose targets are to be decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memdlm.types import IGNORE_INDEX, Ids, PositionSet


class EncodedText(Protocol):
    """Token ids and, per token, a label that is -100 where the token is given."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids."""

    @property
    def labels(self) -> list[int]:
        """Per token its id where it is to be decoded, else -100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The part of a batch that a memory writes."""

    ids: Ids
    labels: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatch:
    """Right-padded texts, [B, L]."""

    ids: Ids
    is_target: PositionSet
    """True where a token is to be decoded."""
    attention_mask: Tensor
    """[B, L] bool, false at padding."""

    def prompt(self) -> Prompt:
        """Return what stands before each row's first target, cut to the longest such part."""
        has_target = self.is_target.any(-1)
        start = torch.where(has_target, self.is_target.int().argmax(-1), self.attention_mask.sum(-1))
        width = int(start.max())
        is_prompt = torch.arange(width, device=start.device) < start[:, None]
        ids = self.ids[:, :width]
        return Prompt(ids=ids, labels=ids.masked_fill(~is_prompt, IGNORE_INDEX), attention_mask=is_prompt)


def pad_texts(texts: Sequence[EncodedText], pad_token_id: int, device: torch.device) -> PaddedBatch:
    """Right-pad `texts` to one batch."""
    width = max(len(text.input_ids) for text in texts)
    ids = torch.full((len(texts), width), pad_token_id, dtype=torch.int64)
    is_target = torch.zeros(len(texts), width, dtype=torch.bool)
    keep = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        length = len(text.input_ids)
        ids[row, :length] = torch.tensor(text.input_ids)
        is_target[row, :length] = torch.tensor(text.labels) != IGNORE_INDEX
        keep[row, :length] = True
    return PaddedBatch(ids=ids.to(device), is_target=is_target.to(device), attention_mask=keep.to(device))


def answer_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return the [start, end) runs of targets in one text: one per assistant turn."""
    spans, start = [], None
    for index, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = index
        elif label == IGNORE_INDEX and start is not None:
            spans.append((start, index))
            start = None
    return spans
