"""The noise of training and evaluation. Each row has its own, drawn from (seed, epoch, row).

Nothing else changes it: not the number of ranks, the split of an optimizer step, an interruption, or the other rows of
the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memdlm.randomness import derive
from memdlm.training.rows import SAMPLE

TIMES, UNIFORM = "noise_times", "noise_uniform"
"""Batch entries [B] and [B, L]: U[0, 1) draws for the times and for the masks. Where each block of a row has its own
time, the times are [B, P]; where noise may be drawn again, both have a dimension of attempts behind the first."""
WRITE = "noise_write"
"""Batch entry: for each row, the key that the memory's draws derive from."""
SOFT = "noise_soft"
"""Batch entry [B]: U[0, 1) draws for whether a row is soft-masked."""

GOLDEN = 0.6180339887498949
"""Fractional part of the golden ratio: its multiples, mod 1, fill [0, 1) evenly, however many they are."""
SILVER = 0.4142135623730951
"""Fractional part of the root of 2: steps between the times of a row's blocks, unlike those between rows."""
ATTEMPTS = 10
"""How often a row's noise is drawn at most until it masks a token (SDAR)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseShape:
    """What is drawn for a row."""

    block: int | None = None
    """Columns that share a time; None: the row has one time."""
    attempts: int = 1

    def parts(self, width: int) -> int:
        """Return the number of times of a row of `width` columns."""
        return 1 if self.block is None else -(-width // self.block)

    def draw(self, width: int, seed: int, epoch: int, sample: int) -> tuple[Tensor, Tensor]:
        """Return the draws (times [1] or [P], masks [width]) of a row, with more attempts [A, ...]."""
        drawn = [self._attempt(width, seed, epoch, sample, attempt) for attempt in range(self.attempts)]
        if self.attempts == 1:
            return drawn[0]
        times, uniform = zip(*drawn, strict=True)
        return torch.stack(times), torch.stack(uniform)

    def _attempt(self, width: int, seed: int, epoch: int, sample: int, attempt: int) -> tuple[Tensor, Tensor]:
        again = () if attempt == 0 else ("again", attempt)
        row = derive(seed, "noise", epoch, sample, *again)
        times = torch.rand(1, generator=row)
        if self.block is not None:
            # A stream of their own: how many blocks a batch is padded to must not change the masks.
            own = derive(seed, "block times", epoch, sample, *again)
            times = torch.rand(self.parts(width), generator=own)
        return times, torch.rand(width, generator=row)


def spread_times(times: Tensor, parts: int) -> Tensor:
    """Return [B, P] from U[0, 1) draws [B]: each is uniform, and the times of a row's parts fill [0, 1) evenly."""
    return torch.frac(times.double()[:, None] + SILVER * torch.arange(parts, dtype=torch.float64)).float()


def add_noise(
    batches: Sequence[dict[str, Any]],
    *,
    seed: int,
    epoch: int,
    step: int,
    stratified: bool,
    shape: NoiseShape | None = None,
    world_size: int = 1,
    hosts: dist.ProcessGroup | None = None,
) -> None:
    """Add draws to this rank's `batches` of one optimizer step, in place.

    `stratified` times are evenly spread over the rows of the whole step, on all ranks: row i of the N (in an order
    that depends on the step alone) gets U[i/N, (i+1)/N). All ranks must then take part, over `hosts`, a group that
    exchanges CPU tensors (see `host_group`; None: the default group does).
    """
    shape = NoiseShape() if shape is None else shape
    for batch in batches:
        width = batch["input_ids"].shape[1]
        # Each row has its own random stream, hence a loop; drawing on the CPU overlaps with the device's work.
        times, uniform = zip(*(shape.draw(width, seed, epoch, sample) for sample in batch[SAMPLE]), strict=True)
        batch[TIMES], batch[UNIFORM] = torch.stack(times), torch.stack(uniform)
        if shape.block is None:
            batch[TIMES] = batch[TIMES].squeeze(-1)
        soft = [derive(seed, "soft", epoch, sample) for sample in batch[SAMPLE]]
        batch[SOFT] = torch.cat([torch.rand(1, generator=row) for row in soft])
        batch[WRITE] = tuple(f"{seed}/write/{epoch}/{sample}" for sample in batch[SAMPLE])
    if stratified:
        _stratify(batches, derive(seed, "strata", step), shape, world_size, hosts)


def host_group() -> dist.ProcessGroup | None:
    """Return a group of all ranks that exchanges CPU tensors; None if the default group does.

    All ranks must call it. In the devices' own group, the row numbers would wait for all work queued on the devices.
    """
    return None if "gloo" in dist.get_backend_config() else dist.new_group(backend="gloo")


def _gathered(own: Sequence[int], world_size: int, hosts: dist.ProcessGroup | None) -> list[list[int]]:
    """Return every rank's numbers; ranks may have different counts."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(own)]), group=hosts)
    sizes = [int(count) for count in counts]
    padded = torch.zeros(max(sizes), dtype=torch.int64)
    padded[: len(own)] = torch.tensor(own, dtype=torch.int64)
    found = [torch.zeros_like(padded) for _ in range(world_size)]
    dist.all_gather(found, padded, group=hosts)
    return [numbers[:size].tolist() for numbers, size in zip(found, sizes, strict=True)]


def _stratify(
    batches: Sequence[dict[str, Any]],
    generator: torch.Generator,
    shape: NoiseShape,
    world_size: int,
    hosts: dist.ProcessGroup | None,
) -> None:
    own = [sample for batch in batches for sample in batch[SAMPLE]]
    everyone = [own] if world_size == 1 else _gathered(own, world_size, hosts)
    rank = dist.get_rank() if world_size > 1 else 0
    # Sorted by row, so that it does not matter which rank has which row. A row may occur twice.
    places = sorted((sample, r, place) for r, samples in enumerate(everyone) for place, sample in enumerate(samples))
    strata = torch.randperm(len(places), generator=generator).tolist()
    mine = {place: strata[index] for index, (_, r, place) in enumerate(places) if r == rank}
    start = 0
    for batch in batches:
        count = len(batch[SAMPLE])
        stratum = torch.tensor([mine[place] for place in range(start, start + count)])
        of_blocks = batch[TIMES] if shape.block is not None else None
        times = (stratum + (batch[TIMES] if of_blocks is None else of_blocks[:, 0])) / len(places)
        batch[TIMES] = times if of_blocks is None else spread_times(times, of_blocks.shape[1])
        start += count


def evaluation_noise(
    seed: int, samples: Sequence[int], shape: Sequence[int], block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the draws (times [B], masks [B, L]) of evaluation rows; a row's draws are always the same.

    Times follow an even sequence over the dataset, so their mean weight hardly varies with its size. With `block`, each
    block has its own time, [B, P]; those of a row follow an even sequence too.
    """
    offset = torch.rand((), generator=derive("evaluation", seed), dtype=torch.float64)
    times = torch.frac(offset + torch.tensor(samples, dtype=torch.float64) * GOLDEN).float()
    uniform = [torch.rand(shape[1], generator=derive("evaluation", seed, sample)) for sample in samples]
    times = times if block is None else spread_times(times, NoiseShape(block=block).parts(shape[1]))
    return times, torch.stack(uniform)
