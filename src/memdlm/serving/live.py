"""Memories on the device: as many as fit into a number of bytes, those that were read last."""

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.inference.decoder import Decoder
from memdlm.memory.adapters import LoRA
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.files.exporting import check_fits
from memdlm.memory.files.fingerprint import Identity
from memdlm.memory.files.packing import unpack
from memdlm.memory.files.saved import SavedMemory
from memdlm.memory.sites import Site, adapted_blocks, find_sites
from memdlm.models.lora.wrappers import unwrap
from memdlm.options import shortened
from memdlm.serving.requests import MemoryId


@dataclass(kw_only=True, slots=True, eq=False)
class LiveMemory:
    """One memory as low-rank pairs by site; every kind of fast weights is read as B A x."""

    sites: dict[str, Site]
    """By path, in the order of the model."""
    values: dict[str, tuple[Tensor, Tensor]]
    """By path, A [1, R, in] and B [1, out, R] (for experts, [E, 1, ...]); B includes the memory's scale."""
    rank: int
    first_block: int
    readers: int = 0
    """Responses that read it now."""
    is_dropped: bool = False
    """Another memory has its name now."""

    @property
    def nbytes(self) -> int:
        """What the values take."""
        return sum(tensor.nbytes for pair in self.values.values() for tensor in pair)

    def moved(self) -> "LiveMemory":
        """Return it with the values where their sites compute."""
        values = {
            path: (a.to(self.sites[path].device, non_blocking=True), b.to(self.sites[path].device, non_blocking=True))
            for path, (a, b) in self.values.items()
        }
        return replace(self, values=values)


@final
class Unpacker:
    """Makes a saved memory ready for one model, on the CPU."""

    def __init__(self, decoder: Decoder) -> None:
        self.model = decoder.model
        self.identity = Identity(unwrap(decoder.model), decoder.tokenizer, decoder.special.mask)

    def unpack(self, saved: SavedMemory, where: str) -> LiveMemory:
        """Check that `saved` was written for this model, and return its values; raises MemoryFileError."""
        config, network = saved.reading_config, unwrap(self.model)
        found = find_sites(self.model, config.targets, config.inner_layer_fraction)
        first, blocks = adapted_blocks(self.model, config.inner_layer_fraction)
        own = FastWeights(found, config.adapter(), network=network, blocks=blocks)
        check_fits(saved, own, config, self.identity.fingerprint(None), where)
        sites = [replace(site, device=torch.device("cpu")) for site in found]
        low_rank = FastWeights(sites, LoRA(), network=network, blocks=blocks)
        tensors = unpack(saved.pairs, saved.rank, low_rank)
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        return LiveMemory(
            sites={site.path: site for site in found},
            values={site.path: (a, b * saved.scale) for site, (a, b) in zip(found, pairs, strict=True)},
            rank=saved.rank,
            first_block=first,
        )


@final
@dataclass(slots=True)
class LiveMemories:
    """The memories that are on the device, within `limit` bytes; what is read now is never dropped."""

    limit: int
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    _held: "OrderedDict[MemoryId, LiveMemory]" = field(default_factory=OrderedDict)
    _dropped: list[LiveMemory] = field(default_factory=list)
    """Still read, under a name that now stands for another memory or for none."""

    def __len__(self) -> int:
        return len(self._held) + len(self._dropped)

    def __contains__(self, memory: MemoryId) -> bool:
        return memory in self._held

    @property
    def nbytes(self) -> int:
        """What they take on the device."""
        return sum(each.nbytes for each in (*self._held.values(), *self._dropped))

    def take(self, memory: MemoryId) -> LiveMemory | None:
        """Return a memory that is here, for one more reader."""
        found = self._held.get(memory)
        if found is not None:
            self._held.move_to_end(memory)
            self.hits += 1
            found.readers += 1
        return found

    def put(self, memory: MemoryId, ready: LiveMemory) -> LiveMemory | None:
        """Bring a memory to the device for one reader; None: there is no room until some reader is done.

        Raises ConfigError for a memory that is larger than all room.
        """
        if ready.nbytes > self.limit:
            raise ConfigError(
                f"memory {shortened(memory)} takes {ready.nbytes} bytes; memory_bytes is {self.limit}. Raise it, or "
                "write the memory with a lower rank."
            )
        if not self._make_room(ready.nbytes):
            return None
        self.misses += 1
        found = self._held[memory] = ready.moved()
        found.readers = 1
        return found

    def _make_room(self, size: int) -> bool:
        idle = sum(each.nbytes for each in self._held.values() if each.readers == 0)
        if self.nbytes - idle + size > self.limit:
            return False
        for name in [name for name, each in self._held.items() if each.readers == 0]:
            if self.nbytes + size <= self.limit:
                break
            del self._held[name]
            self.evictions += 1
        return True

    def leave(self, held: LiveMemory) -> None:
        """Note that a reader is done."""
        held.readers -= 1
        if held.readers == 0 and held.is_dropped:
            self._dropped = [each for each in self._dropped if each is not held]

    def drop(self, memory: MemoryId) -> None:
        """Let go of a memory; who reads it now reads on."""
        found = self._held.pop(memory, None)
        if found is not None and found.readers:
            found.is_dropped = True
            self._dropped.append(found)


@final
class Stacks:
    """Lets the rows of a pass read their own memories: as one tensor per site, padded with zeros, which add nothing.

    Memories may differ in everything: a lower rank is filled up with zeros, and so is a projection that some memory
    does not adapt, and a row without a memory. That is exact: zeros times anything finite are zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fast: dict[tuple[str, ...], FastWeights] = {}
        self._stacks: dict[tuple[int, ...], tuple[list[LiveMemory], FastWeights, list[Tensor], int]] = {}
        self._used: set[tuple[int, ...]] = set()

    @property
    def nbytes(self) -> int:
        """What the copies take on the device."""
        return sum(
            tensor.nbytes for _, _, tensors, samples in self._stacks.values() if samples > 1 for tensor in tensors
        )

    def of(self, rows: list[LiveMemory | None]) -> tuple[FastWeights, list[Tensor], int] | None:
        """Return fast weights for rows that read `rows`, their values, and how many samples; None: no memory."""
        read = [each for each in rows if each is not None]
        if not read:
            return None
        key = tuple(0 if each is None else id(each) for each in rows)
        self._used.add(key)
        if key not in self._stacks:
            fast = self._fast_for(read)
            is_one = len(set(key)) == 1
            values = [self._stacked(site, rows[:1] if is_one else rows) for site in fast.sites]
            # Whoever is stacked is held, so that no other memory gets its id.
            self._stacks[key] = read, fast, [tensor for pair in values for tensor in pair], 1 if is_one else len(rows)
        _, fast, tensors, samples = self._stacks[key]
        return fast, tensors, samples

    def sweep(self) -> None:
        """Drop the stacks that were not read since the last sweep."""
        self._stacks = {key: stack for key, stack in self._stacks.items() if key in self._used}
        self._used.clear()

    def _fast_for(self, read: list[LiveMemory]) -> FastWeights:
        """Return fast weights at the sites that some memory adapts, in the order of the model."""
        sites = {path: site for each in read for path, site in each.sites.items()}
        key = tuple(sorted(sites))
        if key not in self._fast:
            network = unwrap(self.model)
            order = {module: place for place, module in enumerate(network.modules())}
            ordered = sorted(sites.values(), key=lambda site: (order[site.module], site.path))
            _, blocks = adapted_blocks(self.model, 1.0)
            first = min(each.first_block for each in read)
            # A rank of 1 and an alpha of 1: the scale is 1, and the rank is that of the values.
            adapter = LoRA(inner_rank=1, inner_alpha=1.0)
            self._fast[key] = FastWeights(ordered, adapter, network=network, blocks=blocks[first:])
        return self._fast[key]

    @staticmethod
    def _stacked(site: Site, rows: list[LiveMemory | None]) -> tuple[Tensor, Tensor]:
        pairs = [None if each is None else each.values.get(site.path) for each in rows]
        if len(pairs) == 1 and pairs[0] is not None:
            return pairs[0]
        first, second = next(pair for pair in pairs if pair is not None)
        rank = max(pair[0].shape[-2] for pair in pairs if pair is not None)
        leading = first.shape[:-3]
        a = first.new_zeros(*leading, len(rows), rank, first.shape[-1])
        b = second.new_zeros(*leading, len(rows), second.shape[-2], rank)
        for row, pair in enumerate(pairs):
            if pair is not None:
                own = pair[0].shape[-2]
                a[..., row, :own, :] = pair[0][..., 0, :, :]
                b[..., row, :, :own] = pair[1][..., 0, :, :]
        return a, b
