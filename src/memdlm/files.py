"""Write results whole or not at all: an earlier result stays until the new one is complete."""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from memdlm.errors import DataError, MachineError, MemDLMError

_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EMFILE, errno.ENFILE),
)
"""Errors in writing a file that are the fault of the machine or its settings."""
_PLACE = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
"""Errors that are the fault of the output's name."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a failure to write `path` inside the block into one line; all other errors pass as they are.

    Raises MachineError when there is no space or no permission, DataError when `path` is, or lies under, a file.
    """
    try:
        yield
    except MemDLMError:
        raise
    # Not OSError alone: safetensors, Arrow and torch have errors of their own for a full disk.
    except Exception as error:
        found = _failure(error, path)
        if found is None:
            raise
        raise found from error


def _failure(error: BaseException, path: str | Path) -> MemDLMError | None:
    code = _errno(error)
    if code is None:
        return None
    if code in _PLACE:
        return DataError(f"the folder {path} is, or lies under, a file, or has no valid name. Name another folder.")
    where = getattr(error, "filename", None) or path
    return MachineError(
        f"{path} could not be written: {os.strerror(code)} ({where}). What was there before is still there. Make room "
        "or get permission, or name another place."
    )


def _errno(error: BaseException) -> int | None:
    """Return the system's error number of a failed write or read, and None for any other error."""
    if isinstance(error, OSError) and error.errno in (*_MACHINE, *_PLACE):
        return error.errno
    text = str(error)
    # The forms in which safetensors and Arrow quote the system's number.
    found = re.search(r"\bos error (\d+)\b|\[errno (\d+)\]", text)
    if found is not None and int(found[1] or found[2]) in (*_MACHINE, *_PLACE):
        return int(found[1] or found[2])
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        # torch does not say why. Once the file is open, its writer fails only for lack of space.
        return errno.ENOSPC
    return None


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write all `contents` beside their places, then move them there; on an error every place is as it was.

    Folders are made as needed. A link is followed: the link stays, and the file it points to is replaced. Raises
    DataError when a folder is, or lies under, a file, and when something other than a regular file is in a place;
    MachineError when the disk is full or may not be written.
    """
    places = {regular(path): content for path, content in contents.items()}
    finished = {place: place.with_name(f".{place.name}.{os.getpid()}.tmp") for place in places}
    for place in finished:
        make_folder(place.parent)
    with writing(next(iter(places), "")):
        try:
            for temporary, content in zip(finished.values(), places.values(), strict=True):
                temporary.write_bytes(content)
                flush(temporary)
            for place, temporary in finished.items():
                os.replace(temporary, place)
        finally:
            for temporary in finished.values():
                temporary.unlink(missing_ok=True)


def regular(path: str | Path) -> Path:
    """Return where a file is to be written, links followed; raises DataError when something else is there."""
    place = resolved(path)
    with writing(path):
        mode = place.stat().st_mode if place.exists() else stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is {kind_of_file(mode)}, not a file that can be replaced. Name another file.")
    return place


def resolved(path: str | Path) -> Path:
    """Return the absolute path, with ~, links and .. followed. Raises DataError for an endless or invalid path."""
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} names no place: {error}.") from error


def kind_of_file(mode: int) -> str:
    """Say what something is, by its `st_mode`."""
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((words for check, words in kinds if check(mode)), "a device")


def make_folder(path: Path) -> None:
    """Make `path` and the folders above it.

    Raises DataError when one of them is a file, MachineError when the system does not allow it.
    """
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # a file system that takes no new folders, such as /proc
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path)) from error


def digest_of(path: Path) -> str:
    """Return the checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk. What they replace may be deleted after that."""
    if path.is_dir():
        for each in path.iterdir():
            flush(each)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def under_base(name: str | Path, variable: str) -> Path:
    """Return where `name` is: itself if it exists or is absolute, else below the folder in environment `variable`.

    A name that is in neither place is returned as it is, for the hub.
    """
    path, base = Path(name), os.environ.get(variable, "").strip()
    if path.is_absolute() or path.exists() or not base:
        return path
    below = Path(base) / path
    return below if below.exists() else path


def name_under_base(name: str | Path, variable: str) -> str:
    """Do what `under_base` does, but return a name outside the folder exactly as it is: ./x stays ./x."""
    found = under_base(name, variable)
    return str(name) if found == Path(name) else str(found)


def cache_folder() -> Path:
    """Return the folder for files that can be made again: MEMDLM_CACHE, or memdlm's own in the user's cache folder."""
    own = os.environ.get("MEMDLM_CACHE", "").strip()
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache").expanduser() / "memdlm"
