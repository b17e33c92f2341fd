"""Count the cost of an evaluation: time, passes and memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch

from memdlm.inference.decoder import Generation
from memdlm.memory.inner_loop import Written
from memdlm.memory.parametric import ParametricMemory


@dataclass(kw_only=True, slots=True)
class Ledger:
    """Sums over the requests of one process."""

    requests: int = 0
    seconds: float = 0.0
    """Wall-clock time of answering and scoring, writes included."""
    forward_passes: int = 0
    """Passes of decoding and scoring, without those of writes."""
    token_positions: int = 0
    """Positions that went through the network in decoding, summed over passes."""
    tokens: int = 0
    """Tokens generated, up to each response's end."""
    writes: int = 0
    """Texts written into memory."""
    written_tokens: int = 0
    write_seconds: float = 0.0
    truncated: int = 0
    """Prompts that lost their beginning."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The model's device, whose peak memory is recorded."""

    def begin(self, device: torch.device) -> None:
        """Start to record the peak memory of `device`: weights count, the temporary memory of loading does not."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(self, result: Generation, requests: int) -> None:
        """Count one decoded batch."""
        self.requests += requests
        self.forward_passes += result.num_forward_passes
        self.token_positions += result.num_token_positions
        self.tokens += result.num_tokens

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the block's time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def summary(self) -> dict[str, Any]:
        """Return the sums, rates that follow from them, and the peak memory since `begin`, in bytes.

        On the CPU, only the peak since the start of the process is known, loading included.
        """
        decoding = self.seconds - self.write_seconds
        sums = asdict(self)
        del sums["device"]
        return {
            **sums,
            "tokens_per_second": self.tokens / self.seconds if self.tokens and self.seconds else None,
            "tokens_per_second_without_writes": self.tokens / decoding if self.tokens and decoding > 0 else None,
            "write_ms_per_token": 1e3 * self.write_seconds / self.written_tokens if self.written_tokens else None,
            "peak_memory_bytes": peak_memory(self.device),
            "peak_memory_of": "GPU" if self.device.type == "cuda" else "process",
        }


@final
class MeteredMemory(ParametricMemory):
    """A memory that records its cost in a ledger."""

    ledger: Ledger

    @contextmanager
    def write(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Iterator[Written]:
        """Write as `ParametricMemory.write` does; the time counts until the block is entered."""
        start = time.perf_counter()
        with super().write(input_ids, *args, **kwargs) as written:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            self.ledger.writes += input_ids.shape[0]
            self.ledger.written_tokens += int(input_ids.numel() if mask is None else mask.sum())
            self.ledger.write_seconds += time.perf_counter() - start
            yield written


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held: on a GPU since its peak was reset, else by the process since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
