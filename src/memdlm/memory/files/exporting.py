"""An open memory as one that can be saved, and whether a saved one fits the model that is to read it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from memdlm.errors import ConfigError, MemoryFileError, NotFiniteError
from memdlm.finite import is_finite
from memdlm.memory.config import FastWeightsConfig, MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.files.fingerprint import Fingerprint
from memdlm.memory.files.packing import check_pairs, layers_of, pack
from memdlm.memory.files.saved import SavedMemory
from memdlm.memory.inner_loop import Written
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


def exported(
    source: WrittenText, fast: FastWeights, row: Any, config: MemoryConfig, fingerprint: Fingerprint
) -> SavedMemory:
    """Return sample `row` of the open memory `fast`, which `source` was written into; None: the only one.

    Raises ConfigError for a row that is not there, NotFiniteError for one that is not finite.
    """
    samples = fast.num_samples
    if row is None and samples > 1:
        raise ConfigError(f"row is missing: {samples} memories are open; say which, from 0 to {samples - 1}.")
    row = 0 if row is None else row
    if isinstance(row, bool) or not isinstance(row, int):
        raise ConfigError(f"row must be an integer, got {shortened(row)}.")
    if not 0 <= row < samples:
        raise ConfigError(f"row {shortened(row)} is not there: {samples} memories are open, from 0 to {samples - 1}.")
    check_written(source.written.losses[-1, row], [value.select(-3, row) for value in fast.tensors()])
    return packed(fast, row, config, fingerprint, source.provenance(row, samples))


def packed(
    fast: FastWeights, row: int, config: MemoryConfig, fingerprint: Fingerprint, provenance: dict[str, Any]
) -> SavedMemory:
    """Return the values of sample `row` as a memory outside the model."""
    rank, pairs = pack(fast, row)
    return SavedMemory(
        fingerprint=fingerprint,
        config=config,
        layers=tuple(layers_of(fast)),
        rank=rank,
        pairs=pairs,
        targets=tuple(target_patterns(fast.network, pairs)),
        provenance=provenance,
    )


def check_fits(
    saved: SavedMemory, fast: FastWeights, config: FastWeightsConfig, fingerprint: Fingerprint, where: str = "memory"
) -> None:
    """Raise MemoryFileError unless `saved` was written for the model of `fingerprint`, to be read as `config` says."""
    reason = saved.fingerprint.mismatch(fingerprint)
    if reason is not None:
        raise MemoryFileError(f"{where}: {reason}.")
    for name in ("inner_adapter_type", "inner_rank", "inner_alpha"):
        if getattr(saved.config, name) != getattr(config, name):
            raise MemoryFileError(
                f"{where}: it was written with mem_{name}={getattr(saved.config, name)!r}, and is to be read with "
                f"{getattr(config, name)!r}. {OWN_OPTIONS}"
            )
    own = tuple(layers_of(fast))
    if saved.layers != own:
        wrong = sorted({layer.name for layer in saved.layers} ^ {layer.name for layer in own})
        raise MemoryFileError(
            f"{where}: it adapts {len(saved.layers)} projections, and is to be read in {len(own)}; they differ in "
            f"{', '.join(wrong[:4]) or 'their sizes'}. {OWN_OPTIONS}"
        )
    check_pairs(saved.pairs, own, saved.rank, where)
