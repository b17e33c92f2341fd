"""How an exception ends a command: a known kind gives one line and a status; any other, a file with its traceback.

Commands raise `MemDLMError` for what they foresee. The table here is for the exceptions of libraries.
"""

import errno
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memdlm.errors import MemDLMError
from memdlm.version import __version__

INPUT, MACHINE = 2, 1
"""Exit statuses: the input is at fault; the machine or the run is."""

_MACHINE_ERRORS = {
    errno.ENOSPC: "no space is left on the device; free some, or name another folder",
    errno.EDQUOT: "the disk quota is used up; free some space, or name another folder",
    errno.EROFS: "the file system is read-only; name another folder",
    errno.EACCES: "permission denied; change the permissions, or name another place",
    errno.EPERM: "the operation is not permitted; change the permissions, or name another place",
    errno.EIO: "the device failed to read or write",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "not enough memory",
    errno.EFBIG: "the file would be larger than the limit (ulimit -f)",
}
_INPUT_ERRORS = {
    errno.ENOENT: "no such file or folder; check the name",
    errno.EISDIR: "this is a folder; name a file",
    errno.ENOTDIR: "a part of the path is a file; name another place",
    errno.EEXIST: "it already exists; choose another name",
    errno.ENAMETOOLONG: "the name is too long; shorten it",
    errno.ELOOP: "its symbolic links form a loop; name another path",
    errno.EINVAL: "the path is not valid",
}
_NO_MEMORY = re.compile(r"not enough memory|out of memory|can't allocate memory|cannot allocate memory", re.I)
_NO_DEVICE = re.compile(r"not compiled with|no NVIDIA driver|No CUDA GPUs|invalid device ordinal|not linked with", re.I)
_NO_ROOM = "there is not enough memory; lower batch sizes or lengths, or use a smaller dtype or another device"
_FOREIGN = {
    "jinja2": "a template could not be rendered",
    "yaml": "a YAML file is damaged",
    "safetensors": "a safetensors file is damaged",
    "pyarrow": "a table is damaged",
    "datasets": "a dataset cannot be used",
    "zipfile": "an archive is damaged",
    "tarfile": "an archive is damaged",
    "sqlite3": "a database is damaged or is no database",
    "huggingface_hub": "the hub did not give what was asked for",
    "requests": "the network did not answer",
    "httpx": "the network did not answer",
}
"""By package: what its own exceptions say about the input."""
_NETWORK = ("requests", "httpx", "urllib3", "aiohttp")


@dataclass(frozen=True, slots=True)
class Fault:
    """What the user is told, and the exit status."""

    message: str
    status: int


def known_fault(error: BaseException) -> Fault | None:
    """Return what `error` means to the user; None if it was not foreseen."""
    if isinstance(error, MemDLMError):
        cause = None if error.__cause__ is None else known_fault(error.__cause__)
        return Fault(str(error), MACHINE if cause is not None and cause.status == MACHINE else error.exit_status)
    for kinds, told in _TABLE:
        if isinstance(error, kinds):
            found = told(error)
            if found is not None:
                return found
    return None


def _os_error(error: BaseException) -> Fault | None:
    assert isinstance(error, OSError)
    where = f"{error.filename!r}: " if error.filename is not None else ""
    if error.errno in _MACHINE_ERRORS:
        return Fault(f"{where}{_MACHINE_ERRORS[error.errno]}.", MACHINE)
    if error.errno in _INPUT_ERRORS:
        return Fault(f"{where}{_INPUT_ERRORS[error.errno]}.", INPUT)
    if isinstance(error, (ConnectionError, TimeoutError)) or _package(error) in _NETWORK:
        return Fault(f"the network did not answer: {_said(error)}. HF_HUB_OFFLINE=1 uses what is cached.", MACHINE)
    return Fault(f"{where}{error.strerror or _said(error)}.", INPUT)


def _runtime_error(error: BaseException) -> Fault | None:
    if _NO_MEMORY.search(str(error)):
        return Fault(f"{_NO_ROOM}: {_said(error)}", MACHINE)
    if _NO_DEVICE.search(str(error)):
        return Fault(f"the device does not exist here: {_said(error)}", MACHINE)
    return None


def _import_error(error: BaseException) -> Fault | None:
    assert isinstance(error, ImportError)
    if error.name is None or error.name.split(".")[0] == "memdlm":
        return None
    return Fault(f"{error.name} cannot be imported: {_said(error)}. Install it with pip.", MACHINE)


def _of_a_package(error: BaseException) -> Fault | None:
    words = _FOREIGN.get(_package(error))
    return None if words is None else Fault(f"{words}: {_said(error)}", INPUT)


_TABLE: Sequence[tuple[type[BaseException], Callable[[BaseException], Fault | None]]] = (
    (MemoryError, lambda error: Fault(f"{_NO_ROOM}.", MACHINE)),
    (OSError, _os_error),
    (UnicodeError, lambda error: Fault(f"text is not valid in its encoding: {_said(error)}", INPUT)),
    (json.JSONDecodeError, lambda error: Fault(f"a JSON file is damaged: {_said(error)}", INPUT)),
    (RecursionError, lambda error: Fault("the input is nested too deeply.", INPUT)),
    (OverflowError, lambda error: Fault(f"a number is too large: {_said(error)}", INPUT)),
    (ImportError, _import_error),
    (RuntimeError, _runtime_error),
    (AssertionError, _runtime_error),
    (Exception, _of_a_package),
)


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0].lstrip("_")


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def save_traceback(error: BaseException, command: Sequence[str]) -> str:
    """Write an unforeseen exception to a file outside the working directory; return its path.

    The file holds the traceback, the command, versions and the platform, but no environment variables.
    """
    lines = [
        f"memdlm {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"command: {shlex.join(command)}",
        "",
        *traceback.format_exception(error),
    ]
    text = "\n".join(lines)
    try:
        handle, path = tempfile.mkstemp(prefix="memdlm-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        # It must not be lost even when there is nowhere to write it.
        print(text, file=sys.stderr)
        return "above"
    return path
