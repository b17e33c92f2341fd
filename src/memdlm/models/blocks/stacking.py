"""How a checkpoint's experts, one tensor each, become the stacked tensors of a layer, without holding a layer twice.

transformers' own operations stack gate and up separately and then join the two stacks, and keep the file's pages of
every expert in memory until the whole model is loaded. Here each expert is copied to its place and its pages are freed.
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
            # The last references: this also frees what a conversion to another dtype or device allocated.
            tensors.clear()
        return {target_patterns[0]: whole}


class Joined(Concatenate):
    """Cuts a stack apart when saving; when loading there is nothing left to join."""

    def convert(self, input_dict: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Return `input_dict`."""
        return input_dict


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let the system drop the pages of `tensors` that belong to a mapped file; they are read again when needed.

    Only whole pages are dropped, so that neighbours in the file keep theirs. Other tensors are left alone. On systems
    other than Linux nothing happens.
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
        # A page of a file can be read again; a page of other memory would be lost.
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
