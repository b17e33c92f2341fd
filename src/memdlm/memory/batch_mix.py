"""What the optimizer steps of a training with memory see (`mem_batch_mix`), and how they write (`mem_chunk_share`)."""

import math
from typing import NamedTuple

from memdlm.errors import ConfigError


class BatchShares(NamedTuple):
    """Shares of the optimizer steps; they sum to 1."""

    alone: float
    """Memory, and no text beyond `mem_batch_reach`."""
    text: float
    """Text, and no memory."""
    both: float
    other: float
    """Text, and the memory of another row."""


def parse_shares(mix: str) -> BatchShares:
    """Return the shares that three or four numbers with commas between them mean; ConfigError for anything else."""
    try:
        numbers = [float(part) for part in mix.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4) or not all(0 <= number <= 1e6 for number in numbers) or not sum(numbers):
        raise ConfigError(
            "mem_batch_mix must be three shares (memory alone, text alone, both) such as 1,1,1, or four (the last: "
            f"text with the memory of another row) such as 1,1,1,1, got {mix!r}."
        )
    return BatchShares(*(number / sum(numbers) for number in [*numbers, 0.0][:4]))


def writes_chunks(share: float, step: int) -> bool:
    """Whether optimizer step `step`, from 0, is among the `share` of steps that write in chunks, evenly spread."""
    return math.floor((step + 1) * share) > math.floor(step * share)
