"""The order in which a canvas is filled: lists of position sets, one per block; rows may have different columns."""

import torch
from torch import Tensor

from memdlm.types import PositionSet


def blocks_after_prompt(prompt_lengths: Tensor, length: int, max_new_tokens: int, block_size: int) -> list[PositionSet]:
    """Cut each row's response into blocks that start at its own prompt end: a list of [B, length] sets."""
    column = torch.arange(length, device=prompt_lengths.device)[None]
    offset = column - prompt_lengths[:, None]
    inside = (offset >= 0) & (offset < max_new_tokens)
    starts = range(0, max_new_tokens, block_size)
    return [inside & (offset >= start) & (offset < start + block_size) for start in starts]


def absolute_blocks(batch: int, length: int, block_size: int, device: torch.device) -> list[PositionSet]:
    """Cut the columns into blocks that start at column 0: a list of [B, length] sets."""
    column = torch.arange(length, device=device)[None].expand(batch, -1)
    return [(column >= start) & (column < start + block_size) for start in range(0, length, block_size)]


def absolute_blocks_from(
    prompt_lengths: Tensor, length: int, max_new_tokens: int, block_size: int
) -> list[PositionSet]:
    """Cut the columns into blocks from column 0, and begin each row with the block of its first response token.

    The k-th set holds the k-th block of every row that is not wholly prompt: [B, length]. A row's last block is
    whole, so it may reach beyond the row's `max_new_tokens`.

        prompt 3, 4 new   p p p . | . . . .      block_size 4
        prompt 5, 4 new   p p p p | p . . . | . . . .
    """
    block = torch.arange(length, device=prompt_lengths.device)[None] // block_size
    first = prompt_lengths[:, None] // block_size
    last = (prompt_lengths[:, None] + max_new_tokens - 1) // block_size
    inside = (block >= first) & (block <= last)
    # One more block than the response fills, because the prompt may end inside a block.
    most = -(-(max_new_tokens - 1) // block_size) + 1
    return [inside & (block == first + index) for index in range(most)]
