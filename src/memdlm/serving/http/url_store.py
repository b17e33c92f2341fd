"""Memories at a URL that fsspec opens: a bucket of an object store, or a folder.

    URL/NAME.mem/00001764374400000000-9f3c21aa-40960.tar

One object is one version of a memory, all its files in a tar archive. Its name says when it was written (nanoseconds),
and how many bytes it has. Readers take the latest one that has all its bytes, so no rename is needed, and a writer that
is killed leaves the earlier version served. A folder of a memory's plain files, as `memdlm memorize` writes and other
tools upload, is read as well, until the first version is written beside it.
"""

import dataclasses
import hashlib
import io
import logging
import re
import secrets
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, final

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from memdlm.errors import ConfigError, MachineError, MemoryFileError
from memdlm.memory import SavedMemory, read_memory
from memdlm.memory.files.header import HEADER_FILE
from memdlm.memory.files.saved import MemorySummary, inspect_memory
from memdlm.models.lora.files import CONFIG_FILE, WEIGHTS_FILE
from memdlm.outputs import MARKER
from memdlm.serving.http.cache import FolderCache
from memdlm.serving.http.store import (
    SUFFIX,
    TRIES,
    FolderStore,
    NamedStore,
    archived,
    by_name,
    check_name,
    missing,
    short_names,
)
from memdlm.serving.requests import MemoryId

log = logging.getLogger("memdlm.serving")
T = TypeVar("T")
VERSION = re.compile(r"(\d{20})-([0-9a-f]{8})-(\d{1,18})\.tar")
FILES = (HEADER_FILE, WEIGHTS_FILE, CONFIG_FILE, MARKER)
"""What is read of a folder of plain files."""
STAMPS = ("size", "ETag", "etag", "ukey", "LastModified", "last_modified", "mtime", "updated", "created", "ino")
"""What the different file systems tell of a file that changes with it."""
CACHE_BYTES = 4 * 2**30
OLD = 24 * 3600 * 10**9
"""Nanoseconds after which an object that is not whole belongs to a writer that was killed."""


class _GoneError(Exception):
    """What was listed is there no more: it was replaced or deleted meanwhile."""


@final
@dataclass(frozen=True, slots=True, order=True)
class _Version:
    """One archive, as listed."""

    written: int
    number: int
    name: str = field(compare=False)
    is_whole: bool = field(compare=False)


@final
@dataclass(slots=True)
class _Place:
    """One folder of the store."""

    name: str
    versions: list[_Version] = field(default_factory=list)
    files: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def latest(self) -> _Version | None:
        """The version that is served; None: there is none, or the plain files are."""
        return max((each for each in self.versions if each.is_whole), default=None)

    @property
    def is_memory(self) -> bool:
        """Whether something is served."""
        return self.latest is not None or HEADER_FILE in self.files

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers that change with what is served."""
        latest = self.latest
        if latest is not None:
            return (latest.written, latest.number)
        told = [(name, [str(info.get(each)) for each in STAMPS]) for name, info in sorted(self.files.items())]
        return (int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:8], "big"),)


@final
class UrlStore(NamedStore):
    """The memories under one URL. Every method that names one lists the URL first; what is read is kept locally.

    Raises ConfigError for a URL that fsspec does not know, and MachineError when its driver is missing or the place
    cannot be listed.
    """

    def __init__(self, url: str, cache_bytes: int = CACHE_BYTES) -> None:
        try:
            # Listings of this process are no older than the call: other processes write too.
            self._files, self._root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise MachineError(f"memories: the file system of {shown(url)!r} is not installed. {error}") from error
        except ValueError as error:
            raise ConfigError(f"memories: {shown(url)!r} is no URL that fsspec opens: {error}.") from error
        self._root = self._root.rstrip("/")
        self.where = shown(url).rstrip("/")
        self._cache = FolderCache(cache_bytes)
        for place in self._listed():
            self._remove(place, [each for each in place.versions if not each.is_whole and _is_old(each)])

    def names(self) -> list[str]:
        """Return the names of all whole memories, sorted."""
        return sorted(self._places())

    def place_of(self, name: str) -> str:
        """Return the memory's folder under the URL; MemoryFileError if there is none of this name."""
        return self._place(name).name

    def name_at(self, place: str) -> str:
        """Return the name of the memory whose folder `place` is, whole or under the URL; MemoryFileError otherwise."""
        wanted = place.removeprefix(f"{self.where}/").rstrip("/")
        for name, found in self._places().items():
            if found.name == wanted:
                return name
        raise MemoryFileError(f"there is no memory {place!r:.200} in the place that this server serves.")

    def version_of(self, name: str) -> tuple[int, ...]:
        """Return when the version was written, and its number; of plain files, a digest of what the place tells."""
        return self._place(name).numbers

    def read(self, memory: MemoryId) -> SavedMemory:
        """Read a memory; MemoryFileError for one that is not there or damaged."""
        return self._with(str(memory), read_memory)

    def describe(self, name: str) -> MemorySummary:
        """Describe a memory; `problem` says what is wrong with a damaged one."""
        place = f"{self.where}/{self._place(name).name}"
        try:
            return dataclasses.replace(self._with(name, inspect_memory), path=place)
        except MemoryFileError as error:
            return MemorySummary(path=place, problem=str(error))

    def keep(self, memory: MemoryId, saved: SavedMemory) -> None:
        """Write a memory as a new version; earlier ones are deleted then."""
        self.check(memory)
        found = self._places().get(str(memory), _Place(f"{memory}{SUFFIX}"))
        with tempfile.TemporaryDirectory(prefix="memdlm-memory-") as scratch:
            folder = Path(scratch) / "memory"
            saved.save(folder)
            with archived(folder, found.name) as archive:
                data = archive.read()
        # A clock that is behind does not put the new version before the earlier one.
        written = max([time.time_ns(), *(each.written + 1 for each in found.versions)])
        name = f"{written:020d}-{secrets.token_hex(4)}-{len(data)}.tar"
        self._put(f"{self._root}/{found.name}", name, data)
        self._clear(found.name)

    def _put(self, folder: str, name: str, data: bytes) -> None:
        for _ in range(TRIES):
            # Whoever deletes a memory takes its empty folder away, perhaps between these two lines.
            with suppress(_GoneError), self._asking("written"):
                self._files.makedirs(folder, exist_ok=True)
                self._files.pipe_file(f"{folder}/{name}", data)
                return
        raise MachineError(f"memories: {self.where} cannot be written: a folder vanishes in it again and again.")

    def check(self, memory: MemoryId) -> None:
        """Raise ConfigError for what is no memory's name, and cannot be that of a new one."""
        try:
            check_name(memory if isinstance(memory, str) else "")
        except ConfigError:
            if memory not in self._places():
                raise

    def delete(self, name: str) -> None:
        """Delete a memory, all its versions; MemoryFileError if there is none of this name."""
        place = self._place(name)
        # The header first and the latest version last: at no time does an earlier memory come back.
        plain = [each for each in FILES if each in place.files]
        for each in [*plain, *(version.name for version in sorted(place.versions))]:
            with suppress(_GoneError), self._asking("deleted"):
                self._files.rm_file(f"{self._root}/{place.name}/{each}")
        with suppress(Exception):  # object stores have no folders, and one with other files in it stays
            self._files.rmdir(f"{self._root}/{place.name}")

    def archive(self, name: str) -> BinaryIO:
        """Return the memory's files as an open tar archive, which the caller closes."""
        place = self._place(name).name
        return self._with(name, lambda folder: archived(folder, place))

    # What lies there. -----------------------------------------------------------------------------------------------

    def _listed(self) -> list[_Place]:
        places: dict[str, _Place] = {}
        for path, info in self._found().items():
            parts = str(path)[len(self._root) :].strip("/").split("/")
            if len(parts) != 2 or parts[0].startswith("."):
                continue
            place = places.setdefault(parts[0], _Place(parts[0]))
            match = VERSION.fullmatch(parts[1])
            if match is not None:
                is_whole = info.get("size") == int(match[3])
                place.versions.append(_Version(int(match[1]), int(match[2], 16), parts[1], is_whole))
            elif parts[1] in FILES:
                place.files[parts[1]] = info
        return list(places.values())

    def _found(self) -> Mapping[str, Mapping[str, Any]]:
        """Return all that lies under the URL."""
        try:
            with self._asking("listed"):
                found: Mapping[str, Mapping[str, Any]] = self._files.find(self._root, detail=True)
        except _GoneError:
            return {}
        return found

    def _places(self) -> dict[str, _Place]:
        found = {each.name: each for each in self._listed() if each.is_memory}
        return {name: found[place] for name, place in short_names(found).items()}

    def _place(self, name: str) -> _Place:
        # A folder is listed entry by entry: while a version replaces another, it can happen that neither is seen.
        for _ in range(TRIES if type(self._files).find is AbstractFileSystem.find else 1):
            found = self._places().get(name)
            if found is not None:
                return found
        raise missing(name)

    def _clear(self, name: str) -> None:
        """Delete what the latest whole version replaces; what cannot be deleted is in nobody's way."""
        place = next((each for each in self._listed() if each.name == name), None)
        latest = None if place is None else place.latest
        if place is None or latest is None:
            return
        self._remove(place, [each for each in place.versions if each < latest], list(place.files))

    def _remove(self, place: _Place, versions: list[_Version], files: list[str] | None = None) -> None:
        for each in [*(files or []), *(version.name for version in sorted(versions))]:
            try:
                with suppress(_GoneError), self._asking("deleted"):
                    self._files.rm_file(f"{self._root}/{place.name}/{each}")
            except MachineError as error:
                log.warning("an earlier version of a memory is left in %s: %s", place.name, error)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Raise _GoneError for a file that is not there, and MachineError for what else the place refuses."""
        try:
            yield
        except FileNotFoundError as error:
            raise _GoneError from error
        except Exception as error:  # each file system has its own
            raise MachineError(
                f"memories: {self.where} cannot be {what}: {type(error).__name__}: {error}. Look at its address, its "
                "rights and its credentials."
            ) from error

    # What is read. --------------------------------------------------------------------------------------------------

    def _with(self, name: str, use: Callable[[Path], T]) -> T:
        """Return what `use` makes of a local folder with a memory's files."""
        for _ in range(TRIES):
            place = self._place(name)
            key = f"{place.name} {place.numbers}"
            try:
                folder = self._cache.take(key, partial(self._fetch, place, name))
            except _GoneError:  # a newer version is there
                continue
            try:
                return use(folder)
            except MemoryFileError as error:
                raise MemoryFileError(by_name(error, folder, name)) from error
            finally:
                self._cache.release(key)
        raise MemoryFileError(f"memory {name!r:.200} is being replaced again and again; try again.")

    def _fetch(self, place: _Place, name: str, folder: Path) -> None:
        latest, source = place.latest, f"{self._root}/{place.name}"
        for each in place.files if latest is None else (latest.name,):
            with self._asking("read"):
                data = self._files.cat_file(f"{source}/{each}")
            if latest is None:
                (folder / each).write_bytes(data)
            else:
                _unpack(data, folder, name)


def _unpack(data: bytes, folder: Path, name: str) -> None:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                end = member.name.rpartition("/")[2]
                file = tar.extractfile(member) if member.isreg() and end in FILES else None
                if file is None:
                    raise tarfile.TarError(f"it holds {member.name!r:.80}")
                (folder / end).write_bytes(file.read())
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise MemoryFileError(
            f"memory {name!r:.200}: its archive is damaged ({error}). Delete it, and write it again."
        ) from error


def shown(url: str) -> str:
    """Return a URL without the names and keys that may stand before its host."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def store_at(place: str) -> NamedStore:
    """Return the store at a URL (with `://`), or in a folder."""
    return UrlStore(place) if "://" in place else FolderStore(place)


def _is_old(version: _Version) -> bool:
    return time.time_ns() - version.written > OLD
