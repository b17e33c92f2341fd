"""The jobs of an engine that have not begun, and how jobs end."""

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import final

from memdlm.errors import EngineFullError
from memdlm.inference.decoder import Job
from memdlm.serving.requests import Done, Failed, MemoryId
from memdlm.serving.tickets import Ticket


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A job in the queue."""

    ticket: Ticket
    job: Job | None
    """A prepared response; None: a write."""
    after: Ticket | None
    """The write of its memory that was submitted before, and must be done before."""

    @property
    def may_begin(self) -> bool:
        """Whether that write is done, or failed."""
        return self.after is None or self.after.is_done


@final
@dataclass(slots=True)
class Counts:
    """What an engine has done."""

    steps: int = 0
    tokens: int = 0
    responses: int = 0
    writes: int = 0
    failed: int = 0
    cancelled: int = 0


@final
@dataclass(slots=True)
class Queue:
    """Jobs in their order, at most `limit`. May be used from any thread."""

    limit: int
    counts: Counts = field(default_factory=Counts)
    changed: threading.Condition = field(default_factory=threading.Condition)
    """Notified of every new job."""
    is_closed: bool = False
    _jobs: deque[Waiting] = field(default_factory=deque)
    _last_write: dict[MemoryId, Ticket] = field(default_factory=dict)
    """By memory, the newest write that is not done."""

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, ticket: Ticket, job: Job | None) -> Ticket:
        """Append a response, or a write without a `job`; raises EngineFullError."""
        name = ticket.request.memory
        with self.changed:
            if self.is_closed:
                raise EngineFullError("the engine is being stopped, or was, and takes no more jobs.")
            if len(self._jobs) >= self.limit:
                raise EngineFullError(
                    f"{len(self._jobs)} jobs are waiting already (queue_limit); wait until some are done."
                )
            self._jobs.append(Waiting(ticket, job, None if name is None else self._last_write.get(name)))
            if job is None:
                self._last_write[name] = ticket
            self.changed.notify_all()
        return ticket

    def close(self) -> None:
        """Take no more jobs."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def jobs(self) -> list[Waiting]:
        """Return all jobs, in their order."""
        with self.changed:
            return list(self._jobs)

    def remove(self, each: Waiting) -> None:
        """Take a job out: it begins, or it has ended."""
        with self.changed:
            self._jobs.remove(each)

    def end(self, ticket: Ticket, event: Done | Failed) -> None:
        """Tell a job's last event, unless it had one."""
        if ticket.is_done:
            return
        if isinstance(event, Failed):
            if ticket.is_cancelled:
                self.counts.cancelled += 1
            else:
                self.counts.failed += 1
        with self.changed:
            name = ticket.request.memory
            if self._last_write.get(name) is ticket:
                del self._last_write[name]
        ticket.tell(event)
