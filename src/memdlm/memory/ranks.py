"""Several processes writing one memory: sums over the data-parallel ranks.

A rank holds part of a batch. Summed gradients, over denominators that count the tokens of all ranks, are the gradient
of the whole batch; a mean of the ranks' means would not be, because ranks mask different numbers of tokens.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn


@final
class Ranks:
    """The processes that share a write. Every method is called by all of them, in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @staticmethod
    def present(group: dist.ProcessGroup | None = None) -> "Ranks | None":
        """Return the ranks of `group` (None: all), or None where there is only this process."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return None
        return Ranks(group)

    @property
    def count(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over the ranks, in one exchange per dtype."""
        return self._exchanged(tensors, lambda flat: dist.all_reduce(flat, group=self.group))

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the first rank's values."""
        return self._exchanged(tensors, lambda flat: dist.broadcast(flat, group=self.group, group_src=0))

    def largest(self, number: int, device: torch.device) -> int:
        """Return the largest of the ranks' numbers. `device` is one that they exchange tensors of; it is waited for."""
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def _exchanged(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> list[Tensor]:
        out = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[index].detach().flatten() for index in places])
            exchange(flat)
            sizes = [tensors[index].numel() for index in places]
            for index, part in zip(places, flat.split(sizes), strict=True):
                out[index] = part.view(tensors[index].shape)
        return out


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of `model` is sharded over ranks by `fully_shard`, which then exchange it in every pass."""
    kind: type = importlib.import_module("torch.distributed.fsdp").FSDPModule
    return any(isinstance(module, kind) for module in model.modules())
