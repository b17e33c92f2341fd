"""Folders on the local disk that stand for things elsewhere, within a number of bytes."""

import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final


@dataclass(slots=True)
class _Held:
    """One folder, and who uses it."""

    folder: Path
    num_bytes: int
    readers: int = 0


@final
class FolderCache:
    """Folders by key, at most `limit` bytes of those that nobody reads. It ends with the process.

    All methods may be called from any thread. A folder that is read is never
    deleted. One that two threads want at the same time may be filled twice; one of the two is kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._root = tempfile.TemporaryDirectory(prefix="memdlm-memories-")
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str, fill: Callable[[Path], None]) -> Path:
        """Return the folder of `key` for one more reader; `fill` is called with an empty one if there is none."""
        with self._lock:
            if self._use(key):
                return self._held[key].folder
        folder = Path(tempfile.mkdtemp(dir=self._root.name))
        try:
            fill(folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        num_bytes = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        with self._lock:
            if self._use(key):
                shutil.rmtree(folder)
            else:
                self._held[key] = _Held(folder, num_bytes, readers=1)
            return self._held[key].folder

    def release(self, key: str) -> None:
        """Say that a reader is done."""
        with self._lock:
            self._held[key].readers -= 1
            total = sum(each.num_bytes for each in self._held.values())
            for other in [name for name, each in self._held.items() if each.readers == 0]:
                if total <= self.limit:
                    break
                dropped = self._held.pop(other)
                total -= dropped.num_bytes
                shutil.rmtree(dropped.folder)

    def _use(self, key: str) -> bool:
        if key not in self._held:
            return False
        self._held.move_to_end(key)
        self._held[key].readers += 1
        return True
