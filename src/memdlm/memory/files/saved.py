"""Memories as files: a folder in PEFT's layout, with what it was written for and from beside it.

    doc.mem/adapter_model.safetensors   low-rank pairs under published module names
    doc.mem/adapter_config.json         what PEFT needs to read them
    doc.mem/memory.json                 fingerprint, options, provenance, checksums

Only safetensors and JSON are read. A folder is written whole or not at all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.errors import CheckpointError, ConfigError, MachineError, MemoryFileError, NotFiniteError
from memdlm.files import digest_of, writing
from memdlm.memory.config import FastWeightsConfig, MemoryConfig
from memdlm.memory.files.fingerprint import Fingerprint
from memdlm.memory.files.header import (
    FORMAT,
    HEADER_FILE,
    check_provenance,
    checked_header,
    fingerprint_of,
    layers_of_header,
)
from memdlm.memory.files.packing import Layer, Pairs, check_pairs, first_unsound
from memdlm.models.lora.adapters import plain_config
from memdlm.models.lora.adapters import scale_of as peft_scale
from memdlm.models.lora.files import CONFIG_FILE, WEIGHTS_FILE, parameter_name, read_adapter, write_adapter
from memdlm.options import from_mapping, names_of
from memdlm.outputs import Kind, Output, content, discard, find, output_folder, written_in
from memdlm.strict_json import read_json


@dataclass(frozen=True, kw_only=True)
class SavedMemory:
    """One memory outside a model, on the CPU."""

    fingerprint: Fingerprint
    config: MemoryConfig
    """The options it was written with. Combined and compressed memories may have another rank."""
    layers: tuple[Layer, ...]
    rank: int
    pairs: Pairs
    targets: tuple[str, ...]
    """Path ends that PEFT matches with the modules that have a pair, and no others."""
    provenance: dict[str, Any]
    """Where it comes from: `tokens` and `ids_sha256` of the text, `write_losses`, and what the caller added."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.config.adapter().scale

    @property
    def reading_config(self) -> MemoryConfig:
        """The options that reading needs, the others at their defaults."""
        return MemoryConfig(**{name: getattr(self.config, name) for name in names_of(FastWeightsConfig)})

    @property
    def num_parameters(self) -> int:
        """Numbers in the file."""
        return sum(tensor.numel() for pair in self.pairs.values() for tensor in pair.values())

    def noted(self, **more: Any) -> "SavedMemory":
        """Return the same memory with `more` provenance."""
        return dataclasses.replace(self, provenance={**self.provenance, **more})

    def save(self, folder: str | Path) -> Path:
        """Write the folder, in the place of an earlier memory if there is one.

        Raises ConfigError when `folder` holds anything else, another process writes there, or `provenance` is no JSON;
        NotFiniteError for a memory that holds NaN or infinity; MachineError when the disk is full or closed to us.
        """
        with output_folder(folder, MEMORY, overwrite=True) as output:
            self.save_to(output)
        return Path(folder)

    def save_to(self, output: Output) -> None:
        """Write the folder into a place that is held already."""
        self._check_provenance()
        with output.replaced() as growing, writing(output.place):
            self.write_adapter(growing)
            header: dict[str, Any] = {
                "format": FORMAT,
                "fingerprint": dataclasses.asdict(self.fingerprint),
                "config": dataclasses.asdict(self.config),
                "layers": [dataclasses.asdict(layer) for layer in self.layers],
                "provenance": self.provenance,
                "sha256": {name: digest_of(growing / name) for name in (WEIGHTS_FILE, CONFIG_FILE)},
            }
            header["sha256"][HEADER_FILE] = _checksum(header)
            (growing / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")

    def write_adapter(self, folder: Path) -> None:
        """Write what PEFT reads, and no more: the pairs and their configuration. Raises NotFiniteError as `save`."""
        unsound = first_unsound(self.pairs)
        if unsound is not None:
            raise NotFiniteError(f"the memory holds NaN or infinity in {unsound}; it is not saved.")
        tensors = {
            parameter_name(module, side): tensor for module, pair in self.pairs.items() for side, tensor in pair.items()
        }
        config = plain_config(self.targets, rank=self.rank, alpha=self.scale * self.rank, base=self.fingerprint.model)
        write_adapter(folder, config, tensors)

    def _check_provenance(self) -> None:
        try:
            json.dumps(self.provenance, allow_nan=False).encode()
            check_provenance(self.provenance)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"provenance cannot be saved: {error}. Give JSON: text, numbers, lists, objects."
            ) from error


def read_memory(folder: str | Path) -> SavedMemory:
    """Read a memory; raises MemoryFileError that says what is missing, damaged or changed."""
    folder = Path(folder)
    where = f"memory {str(folder)!r}"
    find(folder, MEMORY)
    header = _header(folder, where)
    try:
        fingerprint = fingerprint_of(header)
        layers = layers_of_header(header, fingerprint)
        config = from_mapping(MemoryConfig, header["config"], f"{where}: memory")
    except ValueError as error:
        raise MemoryFileError(f"{where}: {HEADER_FILE} does not say what a memory needs: {error}.") from error
    try:
        peft, pairs = read_adapter(folder)
    except CheckpointError as error:
        raise MemoryFileError(f"{where}: {error}") from error
    saved = SavedMemory(
        fingerprint=fingerprint,
        config=config,
        layers=layers,
        rank=peft.r,
        pairs=pairs,
        targets=tuple(sorted(peft.target_modules or ())),
        provenance=header["provenance"],
    )
    if abs(peft_scale(peft) - saved.scale) > 1e-9 * saved.scale:
        raise MemoryFileError(
            f"{where}: {CONFIG_FILE} says a scale of {peft_scale(peft)}, {HEADER_FILE} one of {saved.scale}; one of "
            "them was changed."
        )
    check_pairs(pairs, saved.layers, saved.rank, where)
    _check_targets(peft.target_modules, pairs, where)
    for name, expected in header["sha256"].items():
        found = _checksum(header) if name == HEADER_FILE else digest_of(folder / name)
        if found != expected:
            raise MemoryFileError(f"{where}: {name} is not what was saved (its checksum differs). Write it again.")
    return saved


def _check_targets(found: Any, pairs: Pairs, where: str) -> None:
    """Raise MemoryFileError unless the path ends that PEFT is told name the modules of `pairs`, each at least one."""
    targets = set() if found is None or isinstance(found, str) else set(found)
    used = {end for module in pairs for end in _ends(module)}
    if not targets <= used or not all(targets.intersection(_ends(module)) for module in pairs):
        raise MemoryFileError(f"{where}: target_modules in {CONFIG_FILE} are not the modules that have tensors.")


def _ends(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]


def is_memory(folder: str | Path) -> bool:
    """Whether `folder` looks like a memory."""
    return (Path(folder) / HEADER_FILE).is_file()


def holds_memories(folder: str | Path) -> bool:
    """Whether some memory lies in `folder`."""
    return Path(folder).is_dir() and any(_memories_in(Path(folder)))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySummary:
    """What `memdlm info` says about one memory."""

    path: str
    problem: str | None
    """Why it cannot be read; None: it can. All that follows is then empty."""
    model: str = ""
    family: str = ""
    rank: int = 0
    num_layers: int = 0
    num_modules: int = 0
    """Modules with a pair; experts without one add nothing."""
    num_left_out: int = 0
    num_parameters: int = 0
    num_bytes: int = 0
    """Of all its files."""
    has_tokenizer: bool = False
    has_learned_start: bool = False
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


def inspect_memory(folder: str | Path) -> MemorySummary:
    """Describe a memory without its model; raises MemoryFileError when it is damaged."""
    saved = read_memory(folder)
    modules = sum(layer.num_experts or 1 for layer in saved.layers)
    return MemorySummary(
        path=str(folder),
        problem=None,
        model=saved.fingerprint.model,
        family=saved.fingerprint.family,
        rank=saved.rank,
        num_layers=len(saved.layers),
        num_modules=len(saved.pairs),
        num_left_out=modules - len(saved.pairs),
        num_parameters=saved.num_parameters,
        num_bytes=sum(file.stat().st_size for file in Path(folder).iterdir()),
        has_tokenizer=saved.fingerprint.tokenizer is not None,
        has_learned_start=saved.fingerprint.learned is not None,
        provenance=saved.provenance,
    )


def _memories_in(folder: Path) -> Iterator[Path]:
    # Hidden folders are memories that are being replaced.
    return (each for each in folder.iterdir() if is_memory(each) and not each.name.startswith("."))


def list_memories(folder: str | Path) -> list[MemorySummary]:
    """Describe the memories in `folder`, by name; of a damaged one, `problem` says what is wrong.

    Raises MemoryFileError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MemoryFileError(f"there is no folder {str(folder)!r} with memories.")
    found = []
    for path in sorted(_memories_in(folder)):
        try:
            found.append(inspect_memory(path))
        except MemoryFileError as error:
            found.append(MemorySummary(path=str(path), problem=str(error)))
    return found


def delete_memory(folder: str | Path) -> None:
    """Delete a memory, damaged or not; raises MemoryFileError when `folder` is none or a link, and touches nothing.

    Raises MachineError when it cannot be deleted.
    """
    folder = Path(folder)
    refuse_link(folder, "Nothing was deleted")
    own = written_in(folder, MEMORY)
    if not own:
        raise MemoryFileError(f"{str(folder)!r} is no memory that memdlm wrote. Nothing was deleted.")
    others = content(folder) - own
    if others:
        raise MemoryFileError(
            f"{str(folder)!r} holds more than a memory ({', '.join(sorted(others)[:4])}). Nothing was deleted."
        )
    discard(folder, MEMORY)
    if folder.exists():
        raise MachineError(f"{str(folder)!r} could not be deleted: no permission.")


def refuse_link(folder: Path, untouched: str) -> None:
    """Raise MemoryFileError for a link: it is one name of a memory that others may use by another."""
    if folder.is_symlink():
        raise MemoryFileError(f"{str(folder)!r} is a link to {str(folder.readlink())!r}. {untouched}; name the memory.")


def _header(folder: Path, where: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise MemoryFileError(f"{where}: there is no such folder.")
    try:
        header = read_json(folder / HEADER_FILE)
    except (OSError, ValueError) as error:
        raise MemoryFileError(f"{where}: {HEADER_FILE} could not be read: {error}.") from error
    try:
        return checked_header(header, (WEIGHTS_FILE, CONFIG_FILE))
    except ValueError as error:
        raise MemoryFileError(f"{where}: {HEADER_FILE} does not say what a memory needs: {error}.") from error


def _without_marker(folder: Path) -> tuple[str, ...]:
    """Return what is a memory's in a folder that has no marker: earlier versions wrote none."""
    try:
        header = _header(folder, str(folder))
    except MemoryFileError:
        return ()
    is_unchanged = header["sha256"][HEADER_FILE] == _checksum(header)
    return (HEADER_FILE, WEIGHTS_FILE, CONFIG_FILE) if is_unchanged else ()


MEMORY = Kind(name="memory", words="a memory", earlier=_without_marker)


def _checksum(header: dict[str, Any]) -> str:
    """Return the digest of all that memory.json says but this."""
    rest = {**header, "sha256": {name: value for name, value in header["sha256"].items() if name != HEADER_FILE}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
