"""The processes of one launch (`accelerate launch`, `torchrun`), which share the documents of a session."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, final

import torch.distributed as dist

from memdlm.errors import ConfigError, MemDLMError

AnyResult = TypeVar("AnyResult")
_PATIENCE = timedelta(days=7)
"""A process that is done waits for the others, however long they write."""


@final
class Team:
    """This process and those that were launched with it; usually this one alone.

    They exchange objects through the CPU; writing itself exchanges nothing. All call `decided` and `gathered`, in the
    same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def launched() -> "Team":
        """Return the launch's processes (RANK, WORLD_SIZE), connected; ConfigError for numbers that cannot be."""
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return Team()
        rank = _number("RANK", 0)
        if not 0 <= rank < size:
            raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {size}; start with accelerate launch or torchrun.")
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but {' and '.join(missing)} are not set; start with accelerate launch or "
                "torchrun, or unset WORLD_SIZE."
            )
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return Team(rank, size)

    @property
    def is_first(self) -> bool:
        """Whether this process decides, and speaks, for all."""
        return self.rank == 0

    def decided(self, decide: Callable[[], AnyResult]) -> AnyResult:
        """Return what the first process decides. An error that is meant for users ends the others without a word."""
        if self.size == 1:
            return decide()
        said: list[Any] = [None, None]
        if self.is_first:
            try:
                said[0] = decide()
            except MemDLMError as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0)
        result: AnyResult = said[0]
        if said[1] is not None:
            raise said[1] if self.is_first else SystemExit(said[1].exit_status)
        return result

    def gathered(self, own: AnyResult) -> list[AnyResult]:
        """Return what each process passed, in their order."""
        found: list[Any] = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(found, own)
        return found

    def share(self, work: Sequence[AnyResult]) -> Sequence[AnyResult]:
        """Return this process's part of `work`: every n-th piece."""
        return work[self.rank :: self.size]


def _number(name: str, usual: int) -> int:
    value = os.environ.get(name, str(usual))
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}; a launcher (accelerate launch, torchrun) sets it to a whole number.")
    return int(value)
