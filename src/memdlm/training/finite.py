"""Watch on the device for values that are not finite; the host reads the result without blocking the device."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

NEVER = 2**62
"""Stands for a step that never came: everything was finite."""


class FiniteWatch:
    """Notes the first step at which each of `kinds` was not finite; the steps stay on the device."""

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
        """Return the number of kinds that were not finite at some step, a scalar that can be summed over ranks."""
        return (self._first < NEVER).sum()

    def first(self) -> Tensor:
        """Return, for every kind, the first step that was not finite; NEVER where there is none."""
        return self._first

    def has_arrived(self, flag: Tensor) -> bool:
        """Return whether a flag is set: on the CPU this flag, on a GPU the flag of the previous call.

        On a GPU only the copy of the previous step is waited for. Since then the device has been given a whole step
        of work, so it never idles. All ranks see a flag at the same step, so no rank waits for one that has stopped.
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
    """Return the largest absolute value in this rank's parts of all floating-point `tensors`; NaN if there is one.

    A sum of squares would be infinite for large, finite numbers.
    """
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    parts = [part.detach() for part in parts if part.is_floating_point() and part.numel() > 0]
    return torch.nn.utils.get_total_norm(parts, math.inf)
