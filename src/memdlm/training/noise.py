"""The noise of training and evaluation: drawn per optimizer step, so that how a step is cut up changes nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm.randomness import derive

TIMES, UNIFORM = "noise_times", "noise_uniform"
"""Batch entries [B] and [B, L]: U[0, 1) draws for the times and for the masks."""

GOLDEN = 0.6180339887498949
"""Fractional part of the golden ratio: multiples of it fill [0, 1) evenly at every length."""


def add_noise(batches: Sequence[dict[str, Any]], *, keys: Sequence[int | str], stratified: bool) -> None:
    """Put draws for one optimizer step into its `batches`, in place.

    One generator, derived from `keys`, draws for all rows of the step at its greatest length: one batch of four rows
    and four batches of one (of equal length) get the same noise. `stratified` times are evenly spread over the step.
    """
    if not batches:
        return
    generator = derive(*keys)
    rows = [len(batch["input_ids"]) for batch in batches]
    total, width = sum(rows), max(batch["input_ids"].shape[1] for batch in batches)
    times = torch.rand(total, generator=generator)
    if stratified:
        times = (torch.randperm(total, generator=generator) + times) / total
    uniform = torch.rand(total, width, generator=generator)
    start = 0
    for batch, count in zip(batches, rows, strict=True):
        batch[TIMES] = times[start : start + count]
        batch[UNIFORM] = uniform[start : start + count, : batch["input_ids"].shape[1]]
        start += count


class EvaluationNoise:
    """The same noise at every evaluation: times from an even sequence, masks from a generator of their own."""

    def __init__(self, *keys: int | str) -> None:
        self.generator = derive(*keys)
        self.offset = torch.rand((), generator=self.generator, dtype=torch.float64).item()
        self.row = 0

    def next(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws (times [B], masks [B, L]) for the next rows, on the device of `ids` [B, L]."""
        batch = ids.shape[0]
        index = torch.arange(self.row, self.row + batch, dtype=torch.float64)
        self.row += batch
        times = torch.frac(self.offset + index * GOLDEN).float()
        return times.to(ids.device), torch.rand(ids.shape, generator=self.generator).to(ids.device)
