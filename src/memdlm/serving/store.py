"""Where an engine's memories are kept: in a folder, or in the process."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import final

from memdlm.errors import MemoryFileError
from memdlm.memory.files.library import find_memory
from memdlm.memory.files.saved import SavedMemory, read_memory
from memdlm.options import shortened
from memdlm.serving.requests import MemoryId


class MemoryStore(ABC):
    """Memories by name. Called from several threads; a memory is read and kept whole or not at all."""

    @abstractmethod
    def read(self, memory: MemoryId) -> SavedMemory:
        """Return a memory; raises MemoryFileError that says why not."""

    @abstractmethod
    def keep(self, memory: MemoryId, saved: SavedMemory) -> None:
        """Keep a memory, in the place of an earlier one; raises what `SavedMemory.save` raises."""

    def check(self, memory: MemoryId) -> None:
        """Raise MemoryFileError for a name under which nothing can be kept."""
        return None


@final
class MemoriesInProcess(MemoryStore):
    """Memories that end with the process."""

    def __init__(self) -> None:
        self._kept: dict[MemoryId, SavedMemory] = {}

    def read(self, memory: MemoryId) -> SavedMemory:
        """Return it."""
        saved = self._kept.get(memory)
        if saved is None:
            raise MemoryFileError(f"memory {shortened(memory)} is not there; write it first.")
        return saved

    def keep(self, memory: MemoryId, saved: SavedMemory) -> None:
        """Hold it."""
        self._kept[memory] = saved

    def forget(self, memory: MemoryId) -> None:
        """Let go of it, if it is there."""
        self._kept.pop(memory, None)


@final
class MemoryFolder(MemoryStore):
    """The memories in one folder, under their folders' names."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def read(self, memory: MemoryId) -> SavedMemory:
        """Read the files."""
        return read_memory(find_memory(self.place(memory)))

    def keep(self, memory: MemoryId, saved: SavedMemory) -> None:
        """Write the files; the folder appears whole or not at all."""
        saved.save(self.place(memory))

    def check(self, memory: MemoryId) -> None:
        """Refuse what is no name of a folder in this one."""
        self.place(memory)

    def place(self, memory: MemoryId) -> Path:
        """Return where a memory lies, or would; raises MemoryFileError for what is no name of a folder in this one."""
        is_name = isinstance(memory, str) and memory.isprintable() and memory.strip(". ") != ""
        if not isinstance(memory, str) or not is_name or memory.startswith(".") or set(memory) & set("/\\:"):
            raise MemoryFileError(
                f"memory {shortened(memory)} is no name of a memory in {str(self.folder)!r}; a name has no slash, "
                "backslash or colon, and does not begin with a dot."
            )
        return self.folder / memory
