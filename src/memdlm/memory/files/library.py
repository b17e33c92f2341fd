"""Kept memories among the folders of a disk: where they lie, and how one gets another name."""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memdlm.errors import ConfigError, MemoryFileError, did_you_mean
from memdlm.files import resolved, writing
from memdlm.memory.files.saved import (
    MEMORY,
    MemorySummary,
    SavedMemory,
    holds_memories,
    inspect_memory,
    is_memory,
    list_memories,
    read_memory,
    refuse_link,
)
from memdlm.outputs import discard, find, output_folder


def find_memory(path: str | Path) -> Path:
    """Return `path` if a memory lies there; raises MemoryFileError that names what lies near it."""
    path, where = Path(path), f"memory {str(path)!r:.200}"
    try:
        find(path, MEMORY)
        is_there, is_folder = is_memory(path), path.is_dir()
        near = sorted(each.name for each in path.parent.iterdir() if is_memory(each)) if path.parent.is_dir() else []
    except (OSError, ValueError) as error:  # no name of a file at all, such as one that is too long
        raise MemoryFileError(f"{where}: there is no such folder.") from error
    if is_there:
        return path
    if is_folder:
        raise MemoryFileError(f"{where}: this folder is no memory.{_inside(path)}")
    raise MemoryFileError(f"{where}: there is no such folder.{did_you_mean(path.name, near)}")


def _inside(folder: Path) -> str:
    names = sorted(each.path for each in list_memories(folder)) if _is_readable(folder) else []
    return f" It holds {', '.join(names[:4])}." if names else ""


def find_memories(path: str | Path) -> list[Path]:
    """Return the memory at `path`, or the memories in that folder, by name. Raises MemoryFileError for none."""
    if _is_readable(Path(path)) and not is_memory(path) and holds_memories(path):
        return sorted(each for each in Path(path).iterdir() if is_memory(each) and not each.name.startswith("."))
    return [find_memory(path)]


def list_below(folder: str | Path) -> list[MemorySummary]:
    """Describe the memories in `folder`, and those in the folders directly in it; of a memory, itself.

    Raises MemoryFileError when there is no such folder.
    """
    if is_memory(folder):
        return [inspect_memory(folder)]
    found = list_memories(folder)
    for each in sorted(_folders(Path(folder))):
        found += list_memories(each)
    return found


def _folders(folder: Path) -> Iterator[Path]:
    return (each for each in folder.iterdir() if not each.name.startswith(".") and _is_readable(each))


def _is_readable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)


def rename_memory(old: str | Path, new: str | Path) -> None:
    """Give a memory another name or place; damaged or not, its files stay as they are.

    Raises MemoryFileError when `old` is no memory or a link, ConfigError when `new` is taken or `old` holds anything
    else.
    """
    place = find_memory(old)
    refuse_link(place, "Nothing was renamed")
    if resolved(old) == resolved(new):
        raise ConfigError(f"rename: {str(new)!r} is the name that it has. Name another.")
    if resolved(old) in resolved(new).parents:
        raise ConfigError(f"rename: {str(new)!r} lies in the memory itself. Name a place outside.")
    with (
        output_folder(old, MEMORY, overwrite=True, option="rename"),
        output_folder(new, MEMORY, overwrite=False, option="rename", flag="another name") as output,
        writing(output.place),
    ):
        try:
            os.rename(resolved(place), output.place)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # On another disk: a copy, of which only a whole one takes the place.
            read_memory(place).save_to(output)
            discard(resolved(place), MEMORY)


def sources_of(memory: SavedMemory) -> list[dict[str, str]]:
    """Return the documents that a memory was written from, each with its `source` and `source_sha256` if noted."""
    return _sources(memory.provenance)


def _sources(provenance: Mapping[str, Any]) -> list[dict[str, str]]:
    for name in ("combined", "sources"):
        if name in provenance:
            return [source for part in provenance[name] for source in _sources(part)]
    return [{name: provenance[name] for name in ("source", "source_sha256") if name in provenance}]
