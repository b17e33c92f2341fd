"""The responses that an engine decodes: who joins, what a step does, who leaves."""

from collections.abc import Iterable, Sequence
from typing import final

from memdlm.errors import MemoryFileError, NotFiniteError
from memdlm.models.networks.soundness import blame
from memdlm.options import shortened
from memdlm.serving.live import LiveMemory
from memdlm.serving.memories import Memories
from memdlm.serving.pool import Pool
from memdlm.serving.queue import Queue, Waiting
from memdlm.serving.requests import Done, Failed, GenerationRequest, Started
from memdlm.serving.responses import Predicted, Running, rows_of
from memdlm.serving.tickets import cancelled

AHEAD = 2
"""For how many times the pool's rows the memories of waiting responses are read ahead."""


@final
class Batch:
    """Responses in the rows of a pool. All methods belong to the engine's thread."""

    def __init__(self, pool: Pool, queue: Queue, memories: Memories) -> None:
        self.pool, self.queue, self.memories = pool, queue, memories
        self.running: list[Running] = []

    def give_up(self) -> None:
        """Let cancelled responses leave."""
        for running in [each for each in self.running if each.ticket.is_cancelled]:
            self.end(running, cancelled(running.ticket))

    def admit(self) -> None:
        """Let waiting responses join, in their order; one whose memory is being read or written is passed over."""
        waiting = [each for each in self.queue.jobs() if each.job is not None]
        self.memories.only({each.ticket.request.memory for each in waiting})
        for each in waiting[: AHEAD * self.pool.slots]:
            name = each.ticket.request.memory
            if name is not None and each.may_begin:
                self.memories.read(name)
        for each in waiting:
            name = each.ticket.request.memory
            if each.job is None or self.pool.room < rows_of(each.job):
                return
            if name is not None and not (each.may_begin and self.memories.is_here(name)):
                continue
            memory = None
            try:
                memory = self._memory_of(each)
                if name is not None and memory is None:
                    return  # nobody overtakes a response that waits for room on the device
                request = each.ticket.request
                assert isinstance(request, GenerationRequest)
                running = Running(ticket=each.ticket, request=request, job=each.job, memory=memory)
                self.pool.admit(running)
            except Exception as error:  # whatever is wrong with one request, the others go on
                if memory is not None:
                    self.memories.live.leave(memory)
                self.queue.remove(each)
                self.queue.end(each.ticket, Failed(error=error))
                continue
            self.queue.remove(each)
            self.running.append(running)
            each.ticket.tell(Started())

    def _memory_of(self, each: Waiting) -> LiveMemory | None:
        name = each.ticket.request.memory
        if name is None:
            return None
        if each.after is not None and each.after.error is not None:
            raise MemoryFileError(f"memory {shortened(name)}: its write failed: {each.after.error}")
        return self.memories.take(name)

    def step(self) -> bool:
        """Do one denoising step of all responses; returns whether there were any."""
        if not self.running:
            return False
        self.queue.counts.steps += 1
        for group in self.pool.groups(self.running):
            for running, found in self._predicted(group):
                try:
                    self._advance(running, found)
                except Exception as error:  # whatever is wrong with one response, the others go on
                    self.end(running, Failed(error=error))
        self.pool.stacks.sweep()
        return True

    def _predicted(self, group: Sequence[Running]) -> Iterable[tuple[Running, Predicted | Exception]]:
        """Return what a pass says to everybody; if it fails, each is run by itself, so that only the bad one fails."""
        try:
            return list(self.pool.predict(group).items())
        except Exception as error:
            if len(group) == 1:
                return [(group[0], error)]
        return [pair for each in group for pair in self._predicted([each])]

    def _advance(self, running: Running, found: Predicted | Exception) -> None:
        if isinstance(found, Exception):
            raise found
        if not found.is_sound:
            message = "the model's logits hold NaN or infinity, from which no token can be chosen."
            raise NotFiniteError(f"{message} {blame(self.pool.decoder.model)}")
        settled, text = running.take(found), None
        if running.request.steps:
            running.ticket.tell(running.stepped())
        if settled is not None:
            running.ticket.tell(settled)
            text = running.stop_text()
        if running.wanted is None or text is not None:
            response = running.response(text)
            self.queue.counts.responses += 1
            self.queue.counts.tokens += len(response.ids)
            self.end(running, Done(result=response))

    def end(self, running: Running, event: Done | Failed) -> None:
        """Take a response's rows back, and tell its last event."""
        self.pool.leave(running)
        self.running.remove(running)
        if running.memory is not None:
            self.memories.live.leave(running.memory)
        self.queue.end(running.ticket, event)
