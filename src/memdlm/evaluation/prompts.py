"""Encoded conversations as padded batches whose targets are to be decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memdlm.diffusion.masking import before_targets
from memdlm.padding import right_padded
from memdlm.types import IGNORE_INDEX, Ids, PositionSet


class EncodedText(Protocol):
    """Token ids and, per token, a label that is -100 where the token is given."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids."""

    @property
    def labels(self) -> list[int]:
        """Per token, its id if it is to be decoded, else -100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatch:
    """Right-padded texts, [B, L]."""

    ids: Ids
    is_target: PositionSet
    """True where a token is to be decoded."""
    attention_mask: Tensor
    """[B, L] bool, false at padding."""

    def prompt(self) -> tuple[Ids, Tensor, PositionSet]:
        """Return (ids, labels, attention mask) of the text before each row's first target, which a memory writes.

        They are cut to the longest such text.
        """
        is_prompt = before_targets(self.is_target, self.attention_mask)
        width = int(is_prompt.sum(-1).max())
        ids, is_prompt = self.ids[:, :width], is_prompt[:, :width]
        return ids, ids.masked_fill(~is_prompt, IGNORE_INDEX), is_prompt


def pad_texts(texts: Sequence[EncodedText], pad_token_id: int, device: torch.device) -> PaddedBatch:
    """Right-pad `texts` into one batch."""
    ids, lengths = right_padded((text.input_ids for text in texts), pad_token_id)
    labels, _ = right_padded((text.labels for text in texts), IGNORE_INDEX)
    is_there = torch.arange(ids.shape[1]) < lengths[:, None]
    ids, is_target, is_there = (each.to(device) for each in (ids, labels != IGNORE_INDEX, is_there))
    return PaddedBatch(ids=ids, is_target=is_target, attention_mask=is_there)


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
