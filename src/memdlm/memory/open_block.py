"""Whose memory a network reads: one open block per network, and only in the thread that opened it."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import nn

from memdlm.errors import ConfigError
from memdlm.models.networks.patching import in_this_thread

PASSED_BY = ("memdlm", "contextlib")
"""Packages through which a caller's call comes here."""
_OPEN: "WeakKeyDictionary[nn.Module, OpenBlock]" = WeakKeyDictionary()
"""By the last block of a network: every memory adapts it, and every face of the network (wrappers, body) shares it."""
# Reentrant: an abandoned generator may be closed, and its block left, while the lock is held.
_LOCK = threading.RLock()


@final
class OpenBlock:
    """What holds a network, from the moment its `with` block is entered until it is left."""

    def __init__(self, kind: str) -> None:
        self.kind, self.since, self.where = kind, time.strftime("%H:%M:%S"), _caller()
        self.take_over()

    def take_over(self) -> None:
        """Belong to the thread of now."""
        self.thread, self._is_mine = threading.current_thread().name, in_this_thread()

    def check_thread(self) -> None:
        """Raise ConfigError in another thread than the owner's (or its backward pass's)."""
        # A compiled call reads the memory that it was compiled with, in the thread that compiled it.
        if not torch.compiler.is_compiling() and not self._is_mine():
            raise ConfigError(
                f"thread {threading.current_thread().name!r} called a model whose memory belongs to another thread: "
                f"{self}. Wait until it is left, or load a model for each thread."
            )

    def __str__(self) -> str:
        return f"a {self.kind} block of thread {self.thread!r}, open since {self.since}, entered at {self.where}"


@contextmanager
def claimed(last_block: nn.Module, kind: str) -> Iterator[OpenBlock]:
    """Hold the network that ends with `last_block`; raises ConfigError, which says who holds it, if it is held."""
    block = OpenBlock(kind)
    with _LOCK:
        holder = _OPEN.setdefault(last_block, block)
    if holder is not block:
        raise ConfigError(
            f"a memory of this model is open already: {holder}. Leave that block first; several texts at the same time "
            "are the rows of one write."
        )
    try:
        yield block
    finally:
        with _LOCK:
            del _OPEN[last_block]


def _caller() -> str:
    """Return file and line of whoever entered the block: the first frame that is not ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in PASSED_BY:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
