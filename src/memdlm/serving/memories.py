"""The memories of an engine: read from the store and kept in it by a thread of their own, so that no step waits."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, final

from memdlm.inference.decoder import Decoder
from memdlm.memory.files.saved import SavedMemory
from memdlm.options import shortened
from memdlm.serving.live import LiveMemories, LiveMemory, Unpacker
from memdlm.serving.requests import MemoryId
from memdlm.serving.store import MemoryStore


@final
class Memories:
    """What is in the store, on its way to the device, and there. All methods belong to the engine's thread."""

    def __init__(self, decoder: Decoder, store: MemoryStore, limit: int) -> None:
        self.store, self.live = store, LiveMemories(limit)
        self._unpacker = Unpacker(decoder)
        self._files = ThreadPoolExecutor(1, thread_name_prefix="memdlm-memories")
        self._reading: dict[MemoryId, Future[LiveMemory]] = {}
        self._keeping: list[tuple[Future[None], Callable[[Exception | None], None]]] = []

    def read(self, memory: MemoryId) -> None:
        """Begin to read a memory, unless it is here or on its way."""
        if memory not in self.live and memory not in self._reading:
            self._reading[memory] = self._files.submit(self._unpacked, memory)

    def only(self, wanted: set[MemoryId]) -> None:
        """Let go of what was read for jobs that are gone."""
        for memory in [each for each, read in self._reading.items() if read.done() and each not in wanted]:
            del self._reading[memory]

    def _unpacked(self, memory: MemoryId) -> LiveMemory:
        return self._unpacker.unpack(self.store.read(memory), f"memory {shortened(memory)}")

    def is_here(self, memory: MemoryId) -> bool:
        """Whether the memory is on the device, or has been read (perhaps in vain)."""
        return memory in self.live or (memory in self._reading and self._reading[memory].done())

    def take(self, memory: MemoryId) -> LiveMemory | None:
        """Return a memory for one more reader; None: there is no room until some reader is done.

        It has been read. Raises what the store raises, and MemoryFileError for a memory of another model.
        """
        found = self.live.take(memory)
        if found is None:
            try:
                found = self.live.put(memory, self._reading[memory].result())
            except Exception:
                # Whoever asks next looks again: the files may be others by then.
                del self._reading[memory]
                raise
        if found is not None:
            self._reading.pop(memory, None)
        return found

    def keep(self, memory: MemoryId, saved: SavedMemory, then: Callable[[Exception | None], None]) -> None:
        """Begin to keep a memory; `then` is called by `poll` when it is kept, or with the error."""

        def kept(error: Exception | None) -> None:
            self.drop(memory)
            then(error)

        self._keeping.append((self._files.submit(self.store.keep, memory, saved), kept))

    def poll(self) -> bool:
        """Call those who wait for a memory to be kept; returns whether there were any."""
        ready = [each for each in self._keeping if each[0].done()]
        self._keeping = [each for each in self._keeping if each not in ready]
        for future, then in ready:
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            then(error)
        return bool(ready)

    def drop(self, memory: MemoryId) -> None:
        """Forget what is here, or on its way, under this name; who reads it now reads on."""
        self.live.drop(memory)
        self._reading.pop(memory, None)

    @property
    def is_busy(self) -> bool:
        """Whether memories are being read or kept."""
        return bool(self._keeping) or any(not each.done() for each in self._reading.values())

    @property
    def is_keeping(self) -> bool:
        """Whether memories are being kept."""
        return bool(self._keeping)

    def wait(self, seconds: float) -> None:
        """Wait until some memory has been read or kept, at most for so long."""
        futures: list[Future[Any]] = [each for each in self._reading.values() if not each.done()]
        futures += [future for future, _ in self._keeping]
        if futures:
            wait(futures, timeout=seconds, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """End the thread, after what it has begun."""
        self._files.shutdown(wait=True, cancel_futures=True)
