"""From an open memory to one that is kept, and back: what `ParametricMemory` saves, loads and recalls."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.errors import ConfigError, MemoryFileError, NotFiniteError
from memdlm.finite import is_finite
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.files.fingerprint import Identity
from memdlm.memory.files.packing import check_pairs, layers_of, pack, unpack
from memdlm.memory.files.saved import SavedMemory, read_memory
from memdlm.memory.inner_loop import Written
from memdlm.memory.learned import LearnedWrite
from memdlm.models.lora.adapters import target_patterns
from memdlm.options import shortened
from memdlm.types import Ids, PositionSet

OWN_OPTIONS = "Build the ParametricMemory with the memory's own options: read_memory(folder).reading_config."


@dataclass(frozen=True, slots=True)
class WrittenText:
    """What the open memory was written from."""

    clean: Ids
    is_maskable: PositionSet
    written: Written
    """Per sample, [K, S]."""

    def provenance(self, row: int, num_samples: int) -> dict[str, object]:
        """Describe sample `row`; one memory for the whole batch is described by all of it."""
        rows = slice(row, row + 1) if num_samples > 1 else slice(None)
        ids = self.clean[rows][self.is_maskable[rows]].cpu()
        return {
            "tokens": ids.numel(),
            "ids_sha256": hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
            # JSON has no NaN: of an update that was left out there is no loss.
            "write_losses": [loss if isfinite(loss) else None for loss in self.written.losses[:, row].tolist()],
        }


def check_written(losses: Tensor, values: Sequence[Tensor]) -> None:
    """Raise NotFiniteError when `values`, or their last `losses`, are not finite; waits for the device once.

    A last update that was left out because its loss was not finite leaves the values that made it so.
    """
    flags = [is_finite(each) for each in (losses, *values)]
    if not all(torch.stack([flag.to(losses.device) for flag in flags]).tolist()):
        raise NotFiniteError(
            f"the memory or its loss is not finite after the write (last losses: {losses.tolist()}); it would make "
            "every answer NaN."
        )


@final
class Keeper:
    """Knows the model that memories are kept for. `source` is what the open block was made from."""

    def __init__(
        self,
        network: nn.Module,
        fast: FastWeights,
        config: MemoryConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        mask_token_id: int,
    ) -> None:
        self.network, self.fast, self.config = network, fast, config
        self.identity = Identity(network, tokenizer, mask_token_id)
        self.source: WrittenText | SavedMemory | None = None

    def export(self, row: int | None, learned: LearnedWrite | None) -> SavedMemory:
        """Do what `ParametricMemory.export` says."""
        if self.source is None:
            raise ConfigError("no memory is open; save inside a `with memory.write(...)` block.")
        self.fast.check_thread()
        if isinstance(self.source, SavedMemory):
            return self.source
        samples = self.fast.num_samples
        if row is None and samples > 1:
            raise ConfigError(f"row is missing: {samples} memories are open; say which, from 0 to {samples - 1}.")
        row = 0 if row is None else row
        if isinstance(row, bool) or not isinstance(row, int):
            raise ConfigError(f"row must be an integer, got {shortened(row)}.")
        if not 0 <= row < samples:
            raise ConfigError(
                f"row {shortened(row)} is not there: {samples} memories are open, from 0 to {samples - 1}."
            )
        check_written(self.source.written.losses[-1, row], [value.select(-3, row) for value in self.fast.tensors()])
        return self._packed(self.fast, row, learned, self.source.provenance(row, samples))

    def unwritten(self, learned: LearnedWrite | None) -> SavedMemory:
        """Do what `ParametricMemory.unwritten` says."""
        start = None if learned is None else learned.start()
        if start is None:
            raise ConfigError("this memory has no learned start: unwritten, it adds nothing.")
        # Values of their own: a memory that is open stays as it is.
        fast = FastWeights(self.fast.sites, self.fast.adapter, network=self.network, blocks=self.fast.blocks)
        fast.replace(start)
        return self._packed(fast, 0, learned, {"tokens": 0})

    def _packed(
        self, fast: FastWeights, row: int, learned: LearnedWrite | None, provenance: dict[str, object]
    ) -> SavedMemory:
        rank, pairs = pack(fast, row, self.network)
        return SavedMemory(
            fingerprint=self.identity.fingerprint(learned),
            config=self.config,
            layers=tuple(layers_of(self.fast.sites, self.network)),
            rank=rank,
            pairs=pairs,
            targets=tuple(target_patterns(self.network, pairs)),
            provenance=provenance,
        )

    def load(self, folder: str | Path, learned: LearnedWrite | None) -> SavedMemory:
        """Do what `ParametricMemory.load` says."""
        saved = read_memory(folder)
        self.check(saved, learned, f"memory {str(folder)!r}")
        return saved

    def check(self, saved: SavedMemory, learned: LearnedWrite | None, where: str = "memory") -> None:
        """Raise MemoryFileError unless `saved` was written for this model, tokenizer and configuration."""
        reason = saved.fingerprint.mismatch(self.identity.fingerprint(learned))
        if reason is not None:
            raise MemoryFileError(f"{where}: {reason}.")
        own = tuple(layers_of(self.fast.sites, self.network))
        for name in ("inner_adapter_type", "inner_rank", "inner_alpha"):
            if getattr(saved.config, name) != getattr(self.config, name):
                raise MemoryFileError(
                    f"{where}: it was written with mem_{name}={getattr(saved.config, name)!r}, and is to be read with "
                    f"{getattr(self.config, name)!r}. {OWN_OPTIONS}"
                )
        if saved.layers != own:
            wrong = sorted({layer.name for layer in saved.layers} ^ {layer.name for layer in own})
            raise MemoryFileError(
                f"{where}: it adapts {len(saved.layers)} projections, and is to be read in {len(own)}; they differ in "
                f"{', '.join(wrong[:4]) or 'their sizes'}. {OWN_OPTIONS}"
            )
        check_pairs(saved.pairs, own, saved.rank, where)

    def values(self, saved: SavedMemory) -> list[Tensor]:
        """Return fast weights, in the order of `FastWeights.tensors`."""
        return unpack(saved.pairs, saved.rank, self.fast, self.network)
