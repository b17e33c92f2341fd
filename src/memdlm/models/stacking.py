"""How a checkpoint's experts, one tensor each, become the stacked tensors of a layer, and no layer is held twice.

transformers' own operations stack gate and up apart and then join the two stacks, and leave the file's pages of every
expert resident until the whole model is there. Here each expert is copied to its place and its pages are given back.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


def stacked_experts() -> tuple[WeightConverter, ...]:
    """Fuse one tensor per expert into stacked tensors: gate and up side by side, down alone."""
    return (
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[StackSideBySide(dim=0), Joined(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[StackSideBySide(dim=0)]),
    )


class StackSideBySide(MergeModulelist):
    """Stack each source's E tensors [out, in] along a new first dimension, all sources in one tensor [E, sum out, in].

    Saving runs `MergeModulelist` backwards, after `Joined` has cut the sources apart.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the stack under the target's name; raises ValueError when the tensors do not fit together."""
        # Files may list them in another order.
        sources = [input_dict.pop(name) for name in source_patterns if name in input_dict]
        if len(sources) != len(source_patterns) or len({len(tensors) for tensors in sources}) != 1:
            raise ValueError(f"the numbers of experts differ: {[len(tensors) for tensors in sources]}")
        shapes = [{tuple(tensor.shape) for tensor in tensors} for tensors in sources]
        if any(len(each) != 1 or len(next(iter(each))) != 2 for each in shapes):
            raise ValueError(f"experts of one layer differ in size: {[sorted(each) for each in shapes]}")
        heights = [tensors[0].shape[0] for tensors in sources]
        first = sources[0][0]
        whole = first.new_empty(len(sources[0]), sum(heights), first.shape[1])
        for part, tensors in zip(whole.split(heights, dim=1), sources, strict=True):
            for index, tensor in enumerate(tensors):
                part[index].copy_(tensor)
            give_back(tensors)
            # With the last reference, what a conversion to another dtype or device allocated is free too.
            tensors.clear()
        return {target_patterns[0]: whole}


class Joined(Concatenate):
    """What cuts a stack apart when saving; loading has nothing left to join."""

    def convert(self, input_dict: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Return `input_dict`."""
        return input_dict


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let the system drop the pages of those `tensors` that are a mapped file's; they would be read again when needed.

    Only whole pages, so that neighbours in the file keep theirs. Other tensors, and other systems than Linux, are left
    alone.
    """
    if not sys.platform.startswith("linux"):
        return
    mapped = _mapped_files()
    advise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        start, stop = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        # A page of a file can come back; one of other memory would be lost.
        if start < stop and any(low <= begin and end <= high for low, high in mapped):
            # A refusal costs memory and nothing else.
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _mapped_files() -> list[tuple[int, int]]:
    """Return (first address, end) of every private mapping of a file in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, permissions, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0" and permissions.endswith("p"):
            low, high = addresses.split("-")
            found.append((int(low, 16), int(high, 16)))
    return found
