"""Whether everything was finite so far, known on the device: the host looks without holding the device up."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

NEVER = 2**62
"""The step at which something that was always finite was not."""


class FiniteWatch:
    """Notes the first step at which each of `kinds` was not finite; all of it stays on the device."""

    def __init__(self, kinds: tuple[str, ...], device: torch.device) -> None:
        self.kinds = kinds
        self._first = torch.full((len(kinds),), NEVER, dtype=torch.int64, device=device)
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def note(self, kind: str, value: Tensor, step: int) -> None:
        """Take a value of optimizer step `step` into account."""
        found = torch.where(value.detach().isfinite().all(), NEVER, step).to(self._first.device)
        place = self._first[self.kinds.index(kind)]
        torch.minimum(place, found, out=place)

    def flag(self) -> Tensor:
        """Return how many kinds were not finite at some step, as a scalar that can be summed over ranks."""
        return (self._first < NEVER).sum()

    def first(self) -> Tensor:
        """Return the first unsound step of every kind, NEVER where there is none."""
        return self._first

    def has_arrived(self, flag: Tensor) -> bool:
        """Return whether a flag is up: on the CPU this one, on a GPU the one of the call before.

        Only the copy of one step earlier is waited for. The device has had a whole step to do since, so it never runs
        out of work; and all ranks see a flag at the same step, so none waits for one that has stopped.
        """
        if flag.device.type != "cuda":
            return bool(flag)
        earlier = self._arriving
        host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._arriving = host, event
        if earlier is None:
            return False
        earlier[1].synchronize()
        return bool(earlier[0])


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest absolute value of this rank's parts of all floating-point `tensors`; NaN where one is in it.

    No sum of squares, which would be infinite for large, finite numbers.
    """
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    parts = [part.detach() for part in parts if part.is_floating_point() and part.numel() > 0]
    return torch.nn.utils.get_total_norm(parts, math.inf)
