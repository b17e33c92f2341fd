"""`Engine`: continuous batching at the granularity of a denoising step, for responses with or without memories."""

from types import TracebackType
from typing import final

from memdlm.inference.decoder import Decoder
from memdlm.serving.requests import Figures, GenerationRequest, MemoryId, WriteRequest
from memdlm.serving.store import MemoriesInProcess, MemoryStore
from memdlm.serving.tickets import Ticket

MIB = 2**20


@final
class Engine:
    """Answers many requests with one model: they join and leave its batch between denoising steps.

        with Engine(decoder, store=MemoryFolder("memories")) as engine:
            ticket = engine.submit(GenerationRequest(prompt=ids, memory="manual"))
            print(ticket.result().text)

    Every response is the one that its request would get alone. The model belongs to the engine's thread meanwhile.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int = 8,
        memory_bytes: int = 1024 * MIB,
        prefix_bytes: int = 1024 * MIB,
        queue_limit: int = 256,
        store: MemoryStore | None = None,
    ) -> None:
        self.decoder = decoder
        self.store = MemoriesInProcess() if store is None else store

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a response. Raises EngineFullError, and ConfigError, DataError or MemoryFileError for a bad request."""
        raise NotImplementedError

    def write(self, request: WriteRequest) -> Ticket:
        """Queue a write. Raises as `submit`. Responses that name the memory and are submitted later wait for it."""
        raise NotImplementedError

    def forget(self, memory: MemoryId) -> None:
        """Drop a memory from the device, for example after its files were changed; the store is not touched."""
        raise NotImplementedError

    def step(self) -> bool:
        """Do one denoising step of all responses, and one gradient of a write; returns whether work is left.

        For tests, and for programs without a thread; not while the engine's own thread runs.
        """
        raise NotImplementedError

    def start(self) -> "Engine":
        """Run steps in a thread of the engine until `stop`."""
        raise NotImplementedError

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no more jobs, give those that are there `drain_s` seconds to end, and cancel the rest."""
        raise NotImplementedError

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def figures(self) -> Figures:
        """Return what the engine does now, and has done."""
        raise NotImplementedError
