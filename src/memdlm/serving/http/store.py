"""Where the server's memories lie: what a store can do, and the folder that does it.

Clients name memories; no part of a name becomes a path. A name that exists is looked up among the names that the store
lists. A new one must have the form of `NAME`.
"""

import io
import re
import tarfile
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, final

from memdlm.errors import ConfigError, MemDLMError, MemoryFileError
from memdlm.files import make_folder, resolved
from memdlm.memory import SavedMemory, is_memory, read_memory
from memdlm.memory.files.header import HEADER_FILE
from memdlm.memory.files.saved import MEMORY, MemorySummary, delete_memory, inspect_memory
from memdlm.outputs import output_folder
from memdlm.serving.requests import MemoryId
from memdlm.serving.store import MemoryStore

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,126}[A-Za-z0-9]|[A-Za-z0-9]")
"""Letters, digits, and inside them dots (one at a time), dashes and underscores; at most 128."""
SUFFIX = ".mem"
T = TypeVar("T")
TRIES = 8
"""How often something is read that others replace meanwhile."""
_LEFT = re.compile(r"\.(.+)\.\d+\.(?:old|tmp)")
"""What a process that was killed left beside a memory, as `memdlm.outputs` names it."""


def check_name(name: str) -> None:
    """Raise ConfigError unless a new memory may be called `name`."""
    if NAME.fullmatch(name) is None or name.endswith(SUFFIX):
        raise ConfigError(
            "name must have 1 to 128 letters, digits, dashes, underscores and single dots, must begin and end with a "
            f"letter or digit, and must not end in {SUFFIX}."
        )


class NamedStore(MemoryStore):
    """What a server needs of a store beside `read` and `keep`: names, and what lies under each.

    All methods may be called from any thread. Another kind of place is another subclass.
    """

    where: str
    """The place, for the operator."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all whole memories, sorted."""

    @abstractmethod
    def place_of(self, name: str) -> str:
        """Return where a memory lies in the store, as `name_at` takes it, or raise MemoryFileError."""

    @abstractmethod
    def name_at(self, place: str) -> str:
        """Return the name of the memory that lies at `place`, absolute or in the store, or raise MemoryFileError."""

    @abstractmethod
    def version_of(self, name: str) -> tuple[int, ...]:
        """Return numbers that change when the memory is replaced; MemoryFileError if there is none of this name."""

    @abstractmethod
    def describe(self, name: str) -> MemorySummary:
        """Describe a memory; `problem` says what is wrong with a damaged one."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a memory; MemoryFileError if there is none of this name."""

    @abstractmethod
    def archive(self, name: str) -> BinaryIO:
        """Return the memory's files as an open tar archive, which the caller closes."""


@final
class FolderStore(NamedStore):
    """The memories directly in one folder. `NAME.mem` has the name NAME, any other folder its own.

    Raises MemDLMError when the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = resolved(folder)
        self.where = str(self.folder)
        make_folder(self.folder)
        for name in self._left_behind():
            self._recover(name)

    def names(self) -> list[str]:
        """Return the names of all whole memories, sorted."""
        return sorted(self._places())

    def place_of(self, name: str) -> str:
        """Return the memory's folder in this one; MemoryFileError if there is none of this name."""
        return self._place(name).name

    def name_at(self, place: str) -> str:
        """Return the name of the memory whose folder `place` is; MemoryFileError for a place outside of the store."""
        try:
            wanted = resolved(self.folder / place)
        except MemDLMError as error:
            raise MemoryFileError(f"{place!r:.200} names no place.") from error
        for name, found in self._places().items():
            if found == wanted:
                return name
        raise MemoryFileError(f"there is no memory {place!r:.200} in the folder that this server serves.")

    def version_of(self, name: str) -> tuple[int, ...]:
        """Return the header's inode and time of change."""
        try:
            found = (self._place(name) / HEADER_FILE).stat()
        except OSError as error:
            raise missing(name) from error
        return (found.st_ino, found.st_mtime_ns)

    def read(self, memory: MemoryId) -> SavedMemory:
        """Read a memory; MemoryFileError for one that is not there or damaged."""
        return self._steady(str(memory), read_memory)

    def describe(self, name: str) -> MemorySummary:
        """Describe a memory; `problem` says what is wrong with a damaged one."""
        place = self._place(name)
        try:
            return self._steady(name, inspect_memory)
        except MemoryFileError as error:
            return MemorySummary(path=str(place), problem=str(error))

    def _steady(self, name: str, use: Callable[[Path], T]) -> T:
        """Return what `use` makes of a memory's folder that was not replaced meanwhile."""
        for _ in range(TRIES):
            version, place = self.version_of(name), self._place(name)
            try:
                found = use(place)
            except MemoryFileError as error:
                if self.version_of(name) == version:
                    raise MemoryFileError(by_name(error, place, name)) from error
            else:
                # Files are read one after the other, and then once more for their checksums: both may be of others.
                if self.version_of(name) == version:
                    return found
        raise MemoryFileError(f"memory {name!r:.200} is being replaced again and again; try again.")

    def keep(self, memory: MemoryId, saved: SavedMemory) -> None:
        """Write a memory, whole or not at all, in the place of an earlier one of its name."""
        self.check(memory)
        saved.save(self._places().get(str(memory), self.folder / f"{memory}{SUFFIX}"))

    def check(self, memory: MemoryId) -> None:
        """Raise ConfigError for what is no memory's name, and cannot be that of a new one."""
        if memory not in self._places():
            check_name(memory if isinstance(memory, str) else "")

    def delete(self, name: str) -> None:
        """Delete a memory; MemoryFileError if there is none of this name."""
        delete_memory(self._place(name))

    def archive(self, name: str) -> BinaryIO:
        """Return the memory's files as an open tar archive, which the caller closes."""
        place = self._place(name)
        return archived(place, place.name)

    def _places(self) -> dict[str, Path]:
        folders = {
            each.name: each for each in self.folder.iterdir() if not each.name.startswith(".") and is_memory(each)
        }
        return {name: folders[place] for name, place in short_names(folders).items()}

    def _place(self, name: str) -> Path:
        found = self._places().get(name)
        if found is None:
            raise missing(name)
        return found

    def _left_behind(self) -> set[str]:
        found = (_LEFT.fullmatch(each.name) for each in self.folder.iterdir() if each.is_dir())
        return {match[1] for match in found if match is not None}

    def _recover(self, name: str) -> None:
        """Restore the earlier memory, and delete the half of a new one, where a server was killed while it wrote."""
        with output_folder(self.folder / name, MEMORY, overwrite=True, option="memories"):
            pass


def short_names(folders: Collection[str]) -> dict[str, str]:
    """Return the names of memories in these folders. Beside a folder NAME, a folder NAME.mem keeps its whole name."""
    short = {folder: folder.removesuffix(SUFFIX) for folder in folders}
    return {(folder if short[folder] in folders else short[folder]): folder for folder in folders}


def archived(folder: Path, name: str) -> BinaryIO:
    """Return a folder's files as an open tar archive, in which the folder is called `name`."""
    # All files are opened first. What replaces the memory meanwhile does not change open files.
    opened = {path.name: path.open("rb") for path in sorted(folder.iterdir()) if path.is_file()}
    found = tempfile.SpooledTemporaryFile(max_size=2**20)  # noqa: SIM115
    try:
        with tarfile.open(fileobj=found, mode="w") as tar:
            for each, file in opened.items():
                member = tarfile.TarInfo(f"{name}/{each}")
                member.size = file.seek(0, io.SEEK_END)
                file.seek(0)
                tar.addfile(member, file)
    finally:
        for file in opened.values():
            file.close()
    found.seek(0)
    return found  # type: ignore[return-value]


def by_name(error: Exception, folder: Path, name: str) -> str:
    """Return an error's text with a memory's name for its folder: clients know names, not folders."""
    return str(error).replace(repr(str(folder)), repr(name)).replace(f"{folder}/", "")


def missing(name: str) -> MemoryFileError:
    """Return the error for a name that the store does not have."""
    return MemoryFileError(f"there is no memory {name!r:.200}.")


def pieces_of(file: BinaryIO, size: int = 2**16) -> Iterator[bytes]:
    """Yield a file in pieces, then close it."""
    with file:
        while piece := file.read(size):
            yield piece
