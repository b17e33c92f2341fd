"""Where the host waits for a CUDA device, as the device itself tells: torch's sync debug mode, by function of ours."""

import collections
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rehearsal.double import place

MESSAGE = "called a synchronizing CUDA operation"


@contextmanager
def waits_of(device: torch.device) -> Iterator["collections.Counter[str]"]:
    """Count the waits in the block by the function that asked; on the CPU, which waits for nothing, there are none.

    torch warns of every one where it happens, so the stack says whose it is. Backward passes run in a thread of
    torch's own: a wait there is told when the pass has ended, by whoever called it.
    """
    found: collections.Counter[str] = collections.Counter()
    if device.type != "cuda":
        yield found
        return

    def show(message: object, *_: object, **__: object) -> None:
        if MESSAGE in str(message):
            found[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
