"""`Engine`: continuous batching at the granularity of a denoising step, for responses with or without memories."""

import threading
import time
from dataclasses import replace
from types import TracebackType
from typing import final

import torch

from memdlm.errors import ConfigError
from memdlm.inference.checking import check_count
from memdlm.inference.config import GenerationConfig
from memdlm.inference.decoder import Decoder, Job
from memdlm.models.networks.checking import check_kind
from memdlm.options import shortened
from memdlm.randomness import derive
from memdlm.serving.batch import Batch
from memdlm.serving.memories import Memories
from memdlm.serving.pool import Pool
from memdlm.serving.queue import Queue
from memdlm.serving.requests import Failed, Figures, GenerationRequest, MemoryId, WriteRequest
from memdlm.serving.responses import rows_of
from memdlm.serving.store import MemoriesInProcess, MemoryStore
from memdlm.serving.tickets import Ticket, cancelled
from memdlm.serving.writes import Writers, Writes

MIB = 2**20
PAUSE = 0.05
"""Seconds after which an engine that waits for a memory's files looks for other work."""


@final
class Engine:
    """Answers many requests with one model: they join and leave its batch between denoising steps.

        with Engine(decoder, store=MemoryFolder("memories")) as engine:
            ticket = engine.submit(GenerationRequest(prompt=ids, memory="manual"))
            print(ticket.result().text)

    Every response is the one that its request would get alone. `slots` are the rows of the batch (a response with
    guidance takes two). At most `memory_bytes` of memories are on the device, those read last; beside them the batch
    has its own copies of those that it reads. `prefix_bytes` bound what is kept of prompts (block-causal families), for
    all memories alike. The keys and values of the batch take what `slots` rows of the longest prompt and response take,
    and a write its own fast weights; they are not bounded here. A write takes one gradient per step, so responses go on
    meanwhile. The options of `decoder` are not read: every request has its own. The model belongs to the engine's
    thread.
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
        check_kind(decoder, Decoder, "decoder", "a Decoder")
        if decoder.memory is not None or decoder.prompt_cache is not None:
            raise ConfigError("decoder has a memory or a prompt cache; requests name their memories. Leave them out.")
        for name, value in (("memory_bytes", memory_bytes), ("prefix_bytes", prefix_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be a whole number of bytes, at least 0, got {shortened(value)}.")
        _check_batched(decoder)
        self.decoder, self.slots = decoder, check_count(slots, "slots", 1024)
        self.memory_bytes, self.prefix_bytes = memory_bytes, prefix_bytes
        self.store = MemoriesInProcess() if store is None else store
        self._queue = Queue(check_count(queue_limit, "queue_limit"))
        self._memories = Memories(decoder, self.store, memory_bytes)
        self._batch = Batch(Pool(decoder, slots, prefix_bytes), self._queue, self._memories)
        self._writers = Writers(decoder)
        self._writes = Writes(self._writers, self._queue, self._memories, slots)
        self._forgotten: list[MemoryId] = []
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._deadline = 0.0
        """When an engine that is being stopped stops, whatever is left."""
        self._is_over = False
        self._figures = self._now()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a response. Raises EngineFullError, and ConfigError, DataError or MemoryFileError for a bad request."""
        check_kind(request, GenerationRequest, "request", "a GenerationRequest")
        return self._queue.put(Ticket(request), self._prepared(request))

    def write(self, request: WriteRequest) -> Ticket:
        """Queue a write. Raises as `submit`. Responses that name the memory and are submitted later wait for it."""
        check_kind(request, WriteRequest, "request", "a WriteRequest")
        if request.memory is None:
            raise ConfigError("memory is missing: a write needs a name under which the memory is kept.")
        self.store.check(request.memory)
        self._writers.check(request)
        return self._queue.put(Ticket(request), None)

    def _prepared(self, request: GenerationRequest) -> Job:
        """Return the decoding that is asked for; raises what it would raise alone."""
        if request.memory is not None:
            self.store.check(request.memory)
        if isinstance(request.stop, str) or not all(isinstance(text, str) and text for text in request.stop):
            raise ConfigError(f"stop must be a tuple of texts that are not empty, got {shortened(request.stop)}.")
        check_kind(request.seed, int, "seed", "a whole number")
        decoder = self.decoder.configured(request.config)
        _check_batched(decoder)
        randomness = [derive("memdlm.generate", request.seed)]
        job = decoder.prepare([list(request.prompt)], randomness, device=torch.device("cpu"))
        job.filling()  # raises here, not in the batch, for options that exclude each other
        if rows_of(job) > self.slots:
            raise ConfigError("cfg_scale takes two slots, and this engine has one; raise slots, or leave it out.")
        return job

    def forget(self, memory: MemoryId) -> None:
        """Drop a memory from the device, for example after its files were changed; the store is not touched."""
        with self._queue.changed:
            self._forgotten.append(memory)
            self._queue.changed.notify_all()

    def holds(self, memory: MemoryId) -> bool:
        """Whether a memory is on the device at this moment; it may leave at the next step."""
        return memory in self._memories.live

    def step(self) -> bool:
        """Do one denoising step of all responses, and one gradient of a write; returns whether work is left.

        For tests, and for programs without a thread; not while the engine's own thread runs (ConfigError).
        """
        if self._thread is not None and threading.current_thread() is not self._thread:
            raise ConfigError("the engine's own thread runs the steps; call step only without start.")
        with self._stepping:
            did = self._memories.poll()
            with self._queue.changed:
                forgotten, self._forgotten = self._forgotten, []
            for memory in forgotten:
                self._memories.drop(memory)
            self._give_up()
            self._batch.admit()
            did |= self._batch.step()
            did |= self._writes.step()
            if not did and self._memories.is_busy:
                self._memories.wait(PAUSE)
            self._figures = self._now()
        return self._has_work

    @property
    def _has_work(self) -> bool:
        is_waiting = bool(self._forgotten) or len(self._queue) > 0
        return is_waiting or bool(self._batch.running) or self._writes.has_work or self._memories.is_busy

    def _give_up(self) -> None:
        """Let go of cancelled jobs."""
        self._batch.give_up()
        self._writes.give_up()
        for each in self._queue.jobs():
            if each.ticket.is_cancelled:
                self._queue.remove(each)
                self._queue.end(each.ticket, cancelled(each.ticket))

    def start(self) -> "Engine":
        """Run steps in a thread of the engine until `stop`. Raises ConfigError the second time."""
        if self._thread is not None or self._is_over:
            raise ConfigError("the engine was started before; make another one.")
        self._thread = threading.Thread(target=self._run, name="memdlm-engine", daemon=True)
        self._thread.start()
        return self

    @property
    def is_running(self) -> bool:
        """Whether the engine's own thread does the steps now."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        changed = self._queue.changed
        while True:
            with changed:
                changed.wait_for(lambda: self._has_work or self._queue.is_closed)
                if self._queue.is_closed and not (self._has_work and time.monotonic() < self._deadline):
                    break
            try:
                self.step()
            except Exception as error:  # a fault of the engine itself: those who wait must hear of it
                self._end_all(error)
        self._end_all(None)

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no more jobs, give those that are there `drain_s` seconds to end, and cancel the rest."""
        self._deadline = time.monotonic() + drain_s
        self._queue.close()
        if self._thread is not None:
            self._thread.join()
        elif not self._is_over:
            while self._has_work and time.monotonic() < self._deadline:
                self.step()
            self._end_all(None)
        if not self._is_over:
            self._is_over = True
            self._memories.close()
            self._figures = self._now()

    def _end_all(self, error: Exception | None) -> None:
        """End all jobs: with `error`, or because the engine stops. Memories that are being kept are kept."""
        tickets = self._writes.clear() + [each.ticket for each in self._queue.jobs()]
        for each in self._queue.jobs():
            self._queue.remove(each)
        for running in list(self._batch.running):
            self._batch.end(running, self._last(running.ticket, error))
        for ticket in tickets:
            self._queue.end(ticket, self._last(ticket, error))
        while self._memories.is_keeping:
            self._memories.wait(PAUSE)
            self._memories.poll()

    @staticmethod
    def _last(ticket: Ticket, error: Exception | None) -> Failed:
        if error is not None:
            return Failed(error=error)
        ticket.cancel()
        return cancelled(ticket, "the engine was stopped")

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def figures(self) -> Figures:
        """Return what the engine does, and has done, as of its last step; `waiting` is of now."""
        return replace(self._figures, waiting=len(self._queue))

    def _now(self) -> Figures:
        pool, live, counts = self._batch.pool, self._memories.live, self._queue.counts
        return Figures(
            running=len(self._batch.running),
            waiting=len(self._queue),
            writing=self._writes.num_texts,
            slots=self.slots,
            live_memories=len(live),
            memory_bytes=live.nbytes,
            memory_bytes_limit=self.memory_bytes,
            stacked_bytes=pool.stacks.nbytes,
            prefix_entries=0 if pool.prefixes is None else len(pool.prefixes),
            prefix_bytes=0 if pool.prefixes is None else pool.prefixes.nbytes,
            prefix_bytes_limit=self.prefix_bytes,
            steps=counts.steps,
            passes=pool.meter.passes,
            positions=pool.meter.positions,
            tokens=counts.tokens,
            responses=counts.responses,
            writes=counts.writes,
            failed=counts.failed,
            cancelled=counts.cancelled,
            memory_hits=live.hits,
            memory_misses=live.misses,
            memory_evictions=live.evictions,
            prefix_reused=pool.meter.reused,
        )


def _check_batched(decoder: Decoder) -> None:
    """Raise ConfigError for options of decoding that a batch of different requests cannot have."""
    for name in ("cache", "compile"):
        value, plain = getattr(decoder.options, name), getattr(GenerationConfig(), name)
        if value != plain:
            raise ConfigError(f"{name}={value!r} is not for an engine, which batches requests; leave {name} out.")
