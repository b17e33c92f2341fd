"""Writes of an engine: several texts at once, one gradient at a time."""

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import final

import torch

from memdlm.errors import DataError
from memdlm.inference.decoder import Decoder
from memdlm.memory.config import MemoryConfig
from memdlm.memory.files.saved import SavedMemory
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.networks.checking import check_ids, check_kind, vocabulary_of
from memdlm.models.networks.sizes import trained_positions
from memdlm.padding import right_padded
from memdlm.randomness import derive
from memdlm.serving.memories import Memories
from memdlm.serving.queue import Queue
from memdlm.serving.requests import Done, Failed, Memorized, MemoryId, Progress, Started, WriteRequest
from memdlm.serving.tickets import Ticket, cancelled
from memdlm.types import IGNORE_INDEX

MOST_CONFIGS = 8
"""Memory objects that are kept for further writes; each has its own sites and knows the model's fingerprint."""
UNEVEN = 2
"""Texts are written together if the longest is shorter than this many times the shortest."""


@final
class Writers:
    """Memory objects by their options."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._known: OrderedDict[MemoryConfig | None, ParametricMemory] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, config: MemoryConfig | None) -> ParametricMemory:
        """Return what writes with `config`; raises ConfigError for options that the model cannot honour."""
        model, mask = self.decoder.model, self.decoder.special.mask
        with self._lock:
            if config not in self._known:
                self._known[config] = ParametricMemory(
                    model, config, mask_token_id=mask, tokenizer=self.decoder.tokenizer
                )
                while len(self._known) > MOST_CONFIGS:
                    self._known.popitem(last=False)
            self._known.move_to_end(config)
            return self._known[config]

    def check(self, request: WriteRequest) -> None:
        """Raise DataError or ConfigError for a text that cannot be written."""
        check_kind(request.seed, int, "seed", "a whole number")
        model = self.of(request.config).model
        check_ids(torch.as_tensor(request.ids), "ids", dim=1, vocabulary=vocabulary_of(model))
        if len(request.ids) == 0:
            raise DataError("ids is empty; give at least one token to write.")

    def together(self, waiting: Sequence[Ticket], most: int) -> list[Ticket]:
        """Return the first of `waiting`, and those behind it that are written in the same batch.

        They have the same options and similar lengths, and are written in one piece. A row of a batch becomes what the
        text becomes alone.
        """
        first = waiting[0]
        request = _request(first)
        memory = self.of(request.config)
        limit = memory.config.chunk_length or trained_positions(self.decoder.model) or len(request.ids)
        if not memory.config.per_sample and memory.config.per_sample is not None:
            return [first]  # all rows of a batch would share one memory
        chosen, names, lengths = [first], {request.memory}, [len(request.ids)]
        for other in waiting[1:]:
            asked = _request(other)
            span = [*lengths, len(asked.ids)]
            fits = max(span) <= limit and max(span) < UNEVEN * min(span)
            if len(chosen) < most and fits and asked.config == request.config and asked.memory not in names:
                chosen.append(other)
                names.add(asked.memory)
                lengths = span
        return chosen


def _request(ticket: Ticket) -> WriteRequest:
    assert isinstance(ticket.request, WriteRequest)
    return ticket.request


@final
class WriteBatch:
    """Texts that are written in one batch, each into its own memory."""

    def __init__(self, memory: ParametricMemory, tickets: Sequence[Ticket]) -> None:
        self.tickets = list(tickets)
        requests = [_request(ticket) for ticket in tickets]
        device = next(memory.model.parameters()).device
        ids, lengths = right_padded([request.ids for request in requests], memory.mask_token_id)
        is_real = torch.arange(ids.shape[1]) < lengths[:, None]
        labels, is_whole = ids.masked_fill(ids == memory.mask_token_id, IGNORE_INDEX), bool(is_real.all())
        ids, labels, is_real = (each.to(device, non_blocking=True) for each in (ids, labels, is_real))
        # One generator per row: no row depends on the others of its batch.
        generators = [derive("memdlm.write", request.seed) for request in requests]
        self.writing = memory.writing(ids, labels, None if is_whole else is_real, generators)

    def step(self) -> bool:
        """Take one gradient; returns whether the write is done."""
        is_done = self.writing.step()
        for ticket in self.tickets:
            ticket.tell(Progress(done=self.writing.done, total=self.writing.total))
        return is_done

    def results(self) -> list[tuple[Ticket, MemoryId, SavedMemory]]:
        """Return every memory that is still wanted, with its ticket and its name."""
        found = []
        for row, ticket in enumerate(self.tickets):
            if not ticket.is_cancelled:
                request = _request(ticket)
                found.append((ticket, request.memory, self.writing.export(row).noted(**request.provenance)))
        return found


@final
class Writes:
    """The writes of an engine: one batch at a time. All methods belong to the engine's thread."""

    def __init__(self, writers: Writers, queue: Queue, memories: Memories, most: int) -> None:
        self.writers, self.queue, self.memories, self.most = writers, queue, memories, most
        self._tickets: list[Ticket] = []
        """The texts of the batch that is under way."""
        self._batch: WriteBatch | None = None
        self._alone: deque[Ticket] = deque()
        """Texts of a batch that failed: each is tried by itself, so that only the bad one fails."""

    @property
    def has_work(self) -> bool:
        """Whether a write has begun and is not done."""
        return bool(self._tickets or self._alone)

    @property
    def num_texts(self) -> int:
        """How many texts are being written."""
        return len(self._tickets) + len(self._alone)

    def step(self) -> bool:
        """Take one gradient of the write that is under way, or of the next; returns whether there was one."""
        if not self._tickets:
            self._tickets = self._next()
        if not self._tickets:
            return False
        try:
            if self._batch is None:
                config = _request(self._tickets[0]).config
                self._batch = WriteBatch(self.writers.of(config), self._tickets)
            if self._batch.step():
                for ticket, name, saved in self._batch.results():
                    self._keep(ticket, name, saved, len(self._tickets))
                self._close()
        except Exception as error:  # whatever is wrong with one text, the others go on
            self._failed(error)
        return True

    def _next(self) -> list[Ticket]:
        if self._alone:
            return [self._alone.popleft()]
        waiting = {each.ticket: each for each in self.queue.jobs() if each.job is None}
        if not waiting:
            return []
        tickets = self.writers.together(list(waiting), self.most)
        for ticket in tickets:
            self.queue.remove(waiting[ticket])
            ticket.tell(Started())
        return tickets

    def _keep(self, ticket: Ticket, name: MemoryId, saved: SavedMemory, together: int) -> None:
        def then(error: Exception | None) -> None:
            if error is not None:
                self.queue.end(ticket, Failed(error=error))
                return
            waiting, running = ticket.seconds()
            self.queue.counts.writes += 1
            result = Memorized(
                memory=name, saved=saved, together=together, seconds_waiting=waiting, seconds_running=running
            )
            self.queue.end(ticket, Done(result=result))

        self.memories.keep(name, saved, then)

    def _failed(self, error: Exception) -> None:
        tickets = self._tickets
        self._close()
        if len(tickets) > 1:
            self._alone.extend(tickets)
        else:
            self.queue.end(tickets[0], Failed(error=error))

    def _close(self) -> None:
        if self._batch is not None:
            self._batch.writing.close()
        self._batch, self._tickets = None, []

    def give_up(self) -> None:
        """Let go of cancelled writes; a batch goes on until nobody wants it."""
        for ticket in [each for each in self._alone if each.is_cancelled]:
            self._alone.remove(ticket)
            self.queue.end(ticket, cancelled(ticket))
        for ticket in self._tickets:
            if ticket.is_cancelled and not ticket.is_done:
                self.queue.end(ticket, cancelled(ticket))
        if self._tickets and all(ticket.is_cancelled for ticket in self._tickets):
            self._close()

    def clear(self) -> list[Ticket]:
        """Give everything up; returns the jobs that have not ended."""
        tickets = [each for each in (*self._tickets, *self._alone) if not each.is_done]
        self._close()
        self._alone.clear()
        return tickets
