"""Metrics of a run: means gathered without waiting for the device, loss by diffusion time, speed."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.models.networks.sizes import active_parameters

BUCKETS = 5
"""Number of equal parts of the diffusion times (0, 1]; the loss of each part is logged separately."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 operations per second, by a word in the device's name (vendors' data sheets)."""


def bucket_names(name: str) -> list[str]:
    """Return the names under which `name` is logged by time: nll_t0.2 is the part up to time 0.2."""
    return [f"{name}_t{(index + 1) / BUCKETS:.1f}" for index in range(BUCKETS)]


def by_time(values: Tensor, counts: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of `values` and `counts` [B, P] in each bucket of `times` [B, P]: two [B, BUCKETS] tensors."""
    bucket = (times * BUCKETS).ceil().long().sub(1).clamp(0, BUCKETS - 1)
    zeros = torch.zeros(len(values), BUCKETS, dtype=torch.float64, device=values.device)
    return zeros.scatter_add(1, bucket, values.double()), zeros.scatter_add(1, bucket, counts.double())


class Means:
    """Weighted means since the last `read`: summed on the device, and over ranks only when they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Count a sum (a scalar) over `count` things."""
        # A plain number is filled in on the device: a copy from the host would wait for it.
        number = count.double() if isinstance(count, Tensor) else total.new_full((), count, dtype=torch.float64)
        self._add(name, torch.stack([total.detach().double(), number]))

    def add_rows(self, name: str, values: Tensor, counts: Tensor, times: Tensor) -> None:
        """Count `values` over `counts` as `name`, and by time under its bucket names; each is [B, P]."""
        self.add(name, values.double().sum(), counts.sum())
        totals, numbers = (each.sum(0) for each in by_time(values.detach(), counts, times))
        for bucket, total, number in zip(bucket_names(name), totals, numbers, strict=True):
            self._add(bucket, torch.stack([total, number]))

    def _add(self, name: str, pair: Tensor) -> None:
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, reduce: Any) -> dict[str, float]:
        """Return the means and start again; `reduce` sums over ranks, all of which have counted the same names."""
        if not self._sums:
            return {}
        names = list(self._sums)
        summed = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, summed, strict=True) if count > 0}


class Speed:
    """Tokens per second, and the share of the device's peak that the outer steps use."""

    def __init__(self, model: nn.Module) -> None:
        self.active = active_parameters(model)
        self._start, self._tokens, self._passed = time.perf_counter(), 0, 0

    def add(self, tokens: int, passed: int) -> None:
        """Count tokens of this rank, padding included, and the columns that go through the network for them."""
        self._tokens += tokens
        self._passed += passed

    def read(self, device: torch.device) -> dict[str, float]:
        """Return this rank's metrics since the last `read`.

        `mfu` counts 6 operations per active parameter and column that passes (forward and backward pass; neither
        attention's score matrix nor the inner loop), divided by the device's peak; it is left out for devices without a
        known peak. In block diffusion a token has two columns, its noised and its clean one.
        """
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        figures = {"tokens_per_second": self._tokens / seconds}
        peak = peak_flops(device)
        if peak is not None:
            figures["mfu"] = 6 * self.active * self._passed / seconds / peak
        self._start, self._tokens, self._passed = now, 0, 0
        return figures


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a device, or None when it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_FLOPS.items() if word in name), None)


NO_MEMORY = -math.inf
"""Stands for a missing bound with memory; unlike NaN, it cannot be confused with a bound that came out as NaN."""


NO_CONTEXT = "nll_no_context"
"""Metric: the bound of rows that have nothing to be written, and are read without memory."""


def row_columns(bound: Tensor, with_memory: Tensor, counts: Tensor, times: Tensor) -> Tensor:
    """Return the evaluation rows [B, 3 + 2 BUCKETS] of a batch, see `row_metrics`; `with_memory` is [B], others [B, P].

    How many parts P the rows have may differ between batches; what is returned does not.
    """
    own = torch.stack([bound.sum(1), with_memory.to(bound.dtype), counts.sum(1).to(bound.dtype)], dim=1)
    return torch.cat([own, *by_time(bound, counts, times)], dim=1).float()


def row_metrics(rows: Tensor) -> dict[str, float]:
    """Turn evaluation rows [N, 3 + 2 BUCKETS] into means per maskable token.

    Columns are the bound, the bound with memory or NO_MEMORY, the count, and the bound and the count by time. Rows
    without memory among others with one have no context: they are told apart, so that `nll` and `nll_memory` are of the
    same rows.
    """
    has_memory = rows[:, 1] != NO_MEMORY
    bare = rows[~has_memory] if has_memory.any() else rows[:0]
    rows = rows[has_memory] if has_memory.any() else rows
    nll = _mean(rows, 0)
    metrics = {"nll": nll, "ppl": safe_exp(nll)}
    if has_memory.any():
        metrics["nll_memory"] = _mean(rows, 1)
    if len(bare):
        metrics[NO_CONTEXT] = _mean(bare, 0)
    totals, numbers = rows[:, 3:].double().sum(0).view(2, BUCKETS)
    pairs: Sequence[tuple[float, float]] = list(zip(totals.tolist(), numbers.tolist(), strict=True))
    for name, (total, number) in zip(bucket_names("nll"), pairs, strict=True):
        if number > 0:
            metrics[name] = total / number
    return metrics


def _mean(rows: Tensor, column: int) -> float:
    """Return the mean of a column per maskable token."""
    return (rows[:, column].double().sum() / rows[:, 2].double().sum().clamp_min(1)).item()


def safe_exp(nll: float) -> float:
    """Return exp(nll), infinity where that is no float."""
    return math.exp(nll) if nll < 700 else math.inf
