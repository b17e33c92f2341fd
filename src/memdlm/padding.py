"""Rows of different lengths as one tensor."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def right_padded(rows: Iterable[Sequence[int] | Tensor], value: int) -> tuple[Tensor, Tensor]:
    """Return (rows [B, L] int64 with `value` behind their ends, lengths [B]); L is the length of the longest."""
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    lengths = torch.tensor([len(row) for row in tensors])
    return pad_sequence(tensors, batch_first=True, padding_value=value), lengths
