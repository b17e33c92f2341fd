"""One process per output: a lock that dies with its process."""

import errno
import fcntl
import logging
import os
import platform
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memdlm.errors import ConfigError
from memdlm.files import make_folder, writing

log = logging.getLogger(__name__)

_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_HOLDER = re.compile(r"memdlm process (\d+ on \S*)\n")
_held: set[Path] = set()
"""Locks that this process holds: the system would grant a process the same lock twice."""
_guard = threading.Lock()


@contextmanager
def locked(file: Path, what: str | Path) -> Iterator[None]:
    """Hold the lock `file` inside the block, while `what` is being written.

    A process that ends in any way, even killed, no longer holds the lock. Raises ConfigError when another process holds
    it (the message names that process) and when `file` is not a lock of memdlm; MachineError when it cannot be made.
    """
    make_folder(file.parent)
    with _guard:
        if file in _held:
            raise ConfigError(_refusal(what, f"{os.getpid()} on {platform.node()} (this one)"))
        _held.add(file)
    try:
        with writing(file):
            descriptor = _take(file, what)
        try:
            yield
        finally:
            # Removed while the lock is held: a process that has opened the file sees that it is gone, and starts over.
            file.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with _guard:
            _held.discard(file)


def _take(file: Path, what: str | Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if _is_taken(file, descriptor, what):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"memdlm process {os.getpid()} on {platform.node()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_taken(file: Path, descriptor: int, what: str | Path) -> bool:
    """Take the lock; returns False when the file was removed meanwhile. Raises ConfigError when another holds it."""
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError(f"{file} is in the way: it is not a lock of memdlm. Move it away.")
    written = os.pread(descriptor, 200, 0).decode(errors="replace")
    holder = _HOLDER.fullmatch(written)
    if written and holder is None:
        raise ConfigError(f"{file} is in the way: it is not a lock of memdlm. Move it away.")
    try:
        # Not flock: forked workers would inherit that lock, and hold it long after this process has ended.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ConfigError(_refusal(what, "unknown" if holder is None else holder[1])) from error
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        log.warning("%s: this file system has no locks; a second process writing there would not be noticed", what)
    try:
        return os.path.samestat(facts, os.stat(file, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _refusal(what: str | Path, process: str) -> str:
    return f"{str(what)!r} is being written by process {process}. Wait until it is done, or name another place."
