"""How an output is replaced: memdlm deletes only what it made, and only when the new output is complete.

A folder that memdlm wrote has a marker, `.memdlm.json`, with its kind and the names of everything written there. A
folder with anything else in it is not replaced. A new folder NAME is written beside its place, as `.NAME.PID.tmp`. Two
renames exchange it with the earlier one, which is called `.NAME.PID.old` between them. If the process is killed at
that point, the earlier folder is restored later. `.NAME.lock` keeps a second process away.
"""

import json
import os
import pwd
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from memdlm.errors import ConfigError, MemDLMError
from memdlm.files import flush, kind_of_file, make_folder, regular, resolved, writing
from memdlm.locks import locked

MARKER = ".memdlm.json"
GENERATOR = '<meta name="generator" content="memdlm">'
"""Stands in the head of every page that memdlm writes, and tells these pages from others."""
_SYSTEM = tuple(
    Path("/", name)
    for name in (
        *("bin", "boot", "dev", "etc", "home", "lib", "lib64", "media", "mnt", "opt", "proc", "root", "run", "sbin"),
        *("srv", "sys", "tmp", "usr", "usr/bin", "usr/lib", "usr/local", "usr/share", "var", "var/lib", "var/tmp"),
        *("Applications", "Library", "System", "Users", "Volumes", "private"),
    )
)
_MOST_NAMES = 4


def _nothing(folder: Path) -> Collection[str]:
    return ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of folder that memdlm writes."""

    name: str
    """The name of the kind in markers."""
    words: str
    """The kind in messages, with an article."""
    earlier: Callable[[Path], Collection[str]] = _nothing
    """For a folder without a marker: returns what memdlm wrote there, as `content` lists it, if it is of this kind."""
    part: str | None = None
    """Name of a folder of the same kind, with a marker of its own, that may lie inside."""


@final
@dataclass(frozen=True, slots=True)
class Output:
    """A folder that this process has locked and may write."""

    place: Path
    kind: Kind

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Yield an empty folder, which replaces the output when the block ends without an error.

        Raises MachineError when the disk is full or may not be written: the output is then as it was.
        """
        with _growing(self.place, self.kind) as growing:
            yield growing
            mark(growing, self.kind)
            flush(growing)
            self._exchange(growing)

    def _exchange(self, growing: Path) -> None:
        if not self.place.exists() or not any(self.place.iterdir()):
            os.replace(growing, self.place)
            return
        # Checked again: hours may have passed since the first time.
        refuse_foreign(self.place, self.kind)
        earlier = _beside(self.place, "old")
        os.replace(self.place, earlier)
        try:
            os.replace(growing, self.place)
        except BaseException:
            os.replace(earlier, self.place)
            raise
        flush_name(self.place)
        discard(earlier, self.kind)


@contextmanager
def output_folder(
    path: str | Path, kind: Kind, *, overwrite: bool, option: str = "output", flag: str = "--overwrite"
) -> Iterator[Output]:
    """Lock a folder for writing; inside the block no other process can write it.

    A link is followed. What a killed process left is cleaned up first. Raises ConfigError, and touches nothing, when
    `path` may not be replaced. That is so when it holds anything that memdlm did not write as this kind, when it holds
    an earlier result and `overwrite` is off, when it is not a folder, when it must never be replaced (see `forbidden`),
    and when another process is writing there.
    """
    place = resolved(path)
    refuse_place(place, path, option)
    with locked(_lock_of(place), path):
        recover(place, kind)
        refuse_foreign(place, kind, shown=path, option=option)
        if place.is_dir() and any(place.iterdir()) and not overwrite:
            raise ConfigError(
                f"{option}: {str(path)!r} holds {kind.words} already: it is not empty; name a new folder, or add "
                f"{flag}."
            )
        yield Output(place, kind)


@contextmanager
def shared_folder(path: str | Path, *, option: str = "output") -> Iterator[Path]:
    """Lock a folder in which outputs are put beside whatever is there; no other process can inside the block.

    Raises ConfigError when `path` is no folder, or another process is writing there.
    """
    place = resolved(path)
    with writing(path):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{option}: {str(path)!r} is {kind_of_file(place.stat().st_mode)}; name a folder.")
    with locked(_lock_of(place), path):
        yield place


@contextmanager
def output_file(
    path: str | Path,
    is_ours: Callable[[Path], bool],
    words: str,
    *,
    overwrite: bool = True,
    option: str = "output",
    flag: str = "--overwrite",
) -> Iterator[Callable[[bytes], None]]:
    """Lock a file for writing; yields a function that writes the whole file.

    `words` say what is written, and `is_ours` says whether an earlier file is of that kind. A link is followed. Raises
    ConfigError, and touches nothing, when an earlier file is of another kind, when there is one and `overwrite` is off,
    and when another process is writing there; DataError when something other than a file is there.
    """
    place = regular(path)

    def check() -> None:
        if regular(path).exists() and not is_ours(place):
            raise ConfigError(
                f"{option}: {str(path)!r} exists and is no {words} that memdlm wrote; it replaces only what it made "
                "itself. Name another file."
            )

    def write(text: bytes) -> None:
        check()
        with _growing(place, _FILE) as growing:
            (growing / place.name).write_bytes(text)
            flush(growing)
            os.replace(growing / place.name, place)

    check()
    if place.exists() and not overwrite:
        raise ConfigError(f"{option}: {str(path)!r} holds {words} already; name another file, or add {flag}.")
    with locked(_lock_of(place), path):
        recover(place, _FILE)
        yield write


_FILE = Kind(name="file", words="a file")


@contextmanager
def _growing(place: Path, kind: Kind) -> Iterator[Path]:
    """Yield an empty folder beside `place`, with a marker that lets memdlm remove it; it is removed afterwards."""
    make_folder(place.parent)
    growing = _beside(place, "tmp")
    with writing(place):
        growing.mkdir()
        try:
            mark(growing, kind, ())
            yield growing
        finally:
            shutil.rmtree(growing, ignore_errors=True)


def is_page(path: Path) -> bool:
    """Whether a file is a page that memdlm wrote."""
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(1024)


def refuse_place(place: Path, shown: str | Path, option: str) -> None:
    """Raise ConfigError when `place`, a resolved path, is not a folder, or is never to be replaced."""
    home = {resolved("~"), *_home_of_user()}
    running = (Path(__file__).parent, Path(sys.prefix), Path(sys.base_prefix), Path(tempfile.gettempdir()))
    reason = forbidden(place, home=home, here=Path.cwd(), running=[resolved(each) for each in running])
    if reason is None and os.path.ismount(place):
        reason = "is a mount point"
    if reason is not None:
        raise ConfigError(f"{option}: {str(shown)!r} {reason}; name a folder of its own, below it or elsewhere.")
    with writing(shown):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{option}: {str(shown)!r} is {kind_of_file(place.stat().st_mode)}; name a folder.")


def forbidden(place: Path, *, home: Iterable[Path], here: Path, running: Iterable[Path]) -> str | None:
    """Return why a folder must never be replaced, whatever is in it, or None if it may be. Does not touch the disk.

    All paths are resolved. `running` are the folders in which this program and its files are.
    """
    if place == Path(place.anchor):
        return "is the root of the file system"
    for words, others in (
        ("the home folder", home),
        ("the working directory", (here,)),
        ("a folder that this program runs from", running),
        ("a folder of the system", _SYSTEM),
    ):
        for other in others:
            if place == other:
                return f"is {words}"
            if place in other.parents:
                return f"holds {words}"
    return None


def _home_of_user() -> Iterator[Path]:
    # HOME may name another folder, as under sudo. In some containers the user's number has no entry.
    with suppress(KeyError):
        yield resolved(pwd.getpwuid(os.getuid()).pw_dir)


def content(folder: Path) -> set[str]:
    """Return the relative paths of all in `folder` but its marker. Folders end in /, links and special files in @."""
    found = set()
    for parent, names, files in os.walk(folder, onerror=_raise):
        for name in (*names, *files):
            path = Path(parent, name)
            kind = "@" if path.is_symlink() else "/" if path.is_dir() else "" if path.is_file() else "@"
            found.add(f"{path.relative_to(folder).as_posix()}{kind}")
    return found - {MARKER}


def _raise(error: OSError) -> None:
    raise error


def marked_as(folder: Path) -> str | None:
    """Return the kind that a folder's marker names, or None if memdlm put no marker there."""
    marker = _marker(folder)
    return None if marker is None else str(marker["kind"])


def _marker(folder: Path) -> dict[str, Any] | None:
    path = folder / MARKER
    try:
        found = json.loads(path.read_text()) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("made_by") != "memdlm" or "kind" not in found:
        return None
    return found if isinstance(found.get("entries"), list) else None


def mark(folder: Path, kind: Kind, entries: Collection[str] | None = None) -> None:
    """Write the marker, which says that `entries` in `folder` are memdlm's; None: everything there."""
    names = sorted(content(folder) if entries is None else entries)
    facts = {"made_by": "memdlm", "kind": kind.name, "entries": names}
    (folder / MARKER).write_text(json.dumps(facts, indent=1) + "\n")


def written_in(folder: Path, kind: Kind) -> set[str]:
    """Return what memdlm wrote into `folder` as one of `kind`, as `content` lists it; empty if it is not one."""
    marker = _marker(folder)
    if marker is None:
        return set(kind.earlier(folder))
    if marker["kind"] != kind.name:
        return set()
    entries = {str(each) for each in marker["entries"]}
    part = folder / kind.part if kind.part is not None else None
    if part is not None and not part.is_symlink() and part.is_dir():
        inside = written_in(part, kind)
        if inside:
            entries |= {f"{part.name}/", *(f"{part.name}/{each}" for each in (MARKER, *inside))}
    return entries


def refuse_foreign(folder: Path, kind: Kind, *, shown: str | Path | None = None, option: str = "output") -> None:
    """Raise ConfigError when `folder` holds anything that memdlm did not write there as one of `kind`."""
    if not folder.is_dir():
        return
    with writing(folder):
        foreign = sorted(content(folder) - written_in(folder, kind))
    if foreign:
        names = ", ".join(each.rstrip("@") for each in foreign[:_MOST_NAMES])
        more = f" and {len(foreign) - _MOST_NAMES} more" if len(foreign) > _MOST_NAMES else ""
        raise ConfigError(
            f"{option}: {str(folder if shown is None else shown)!r} is not empty, and memdlm did not write "
            f"{names}{more} there as part of {kind.words}; it replaces only what it made itself. Name a new folder."
        )


def discard(folder: Path, kind: Kind) -> None:
    """Delete what memdlm wrote into `folder`. If anything else is in it, that stays, and so does the folder."""
    # The marker goes last, so that an interrupted deletion can be finished later.
    remove(folder, written_in(folder, kind))
    remove(folder, (MARKER, ""))


def remove(folder: Path, entries: Iterable[str]) -> None:
    """Delete `entries`, named as by `content`, in `folder`; "" is the folder itself. Links and full folders stay."""
    # Deepest first, and the folder itself last.
    for entry in sorted(entries, key=lambda each: (each != "", each.rstrip("/").count("/")), reverse=True):
        path = folder / entry
        # What cannot be deleted now is tried again at the next use. The new result is already in place.
        with suppress(OSError):
            if entry.endswith("/") or not entry:
                path.rmdir()
            elif not path.is_symlink():
                path.unlink()


def recover(place: Path, kind: Kind) -> None:
    """Clean up what killed processes left beside `place`: restore an earlier result, delete unfinished ones.

    Call it while holding the lock of `place`.
    """
    left = sorted(_left_of(place), key=lambda each: each[0].stat().st_mtime, reverse=True)
    for path, pid in left:
        if path.suffix == ".old" and not os.path.lexists(place) and _is_whole(path, kind):
            os.replace(path, place)
        elif _is_alive(pid):
            continue
        elif path.suffix == ".old" and place.exists():
            discard(path, kind)
        elif path.suffix == ".tmp" and marked_as(path) is not None:
            shutil.rmtree(path)


def find(path: str | Path, kind: Kind) -> None:
    """Restore `path`, before it is read, if it is missing because a process was killed while replacing it."""
    place = resolved(path)
    if place.exists() or not any(left.suffix == ".old" for left, _ in _left_of(place)):
        return
    # A process that holds the lock will put something there. Where nothing can be written, nothing is restored.
    with suppress(MemDLMError), locked(_lock_of(place), path):
        recover(place, kind)


def _left_of(place: Path) -> Iterator[tuple[Path, int]]:
    """Yield folders that processes left beside `place`, with the number of the process."""
    if place.parent.is_dir():
        for path in list(place.parent.iterdir()):
            match = re.fullmatch(rf"\.{re.escape(place.name)}\.(\d+)\.(old|tmp)", path.name)
            if match is not None and path.is_dir() and not path.is_symlink():
                yield path, int(match[1])


def _is_whole(folder: Path, kind: Kind) -> bool:
    entries = written_in(folder, kind)
    return bool(entries) and entries <= content(folder)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process had the same number: this one holds the lock and has only begun
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def flush_name(path: Path) -> None:
    """Wait until the name of `path` is on the disk."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(place: Path, suffix: str) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}.{suffix}")


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")
