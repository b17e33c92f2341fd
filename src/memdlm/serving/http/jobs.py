"""Jobs that outlive their request: texts that become memories, and how far each has come."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, final

from memdlm.serving.http.errors import ApiError
from memdlm.serving.tickets import Ticket

MOST_PENDING, MOST_KEPT = 64, 256
PENDING = ("queued", "reading", "writing")


@final
@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """One memory that is being made."""

    name: str
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    status: str = "queued"
    """queued, reading (the upload), writing, done, failed, or cancelled."""
    done: int = 0
    """Gradients taken."""
    total: int = 0
    """Gradients that the write takes; 0: not known yet."""
    tokens: int = 0
    error: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    finished: int | None = None
    ticket: Ticket | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def is_pending(self) -> bool:
        """Whether it goes on."""
        return self.status in PENDING

    def end(self, status: str, error: str | None = None) -> None:
        """Say how it ended, once."""
        if self.is_pending:
            self.status, self.error, self.finished, self.ticket = status, error, int(time.time()), None

    def told(self) -> dict[str, Any]:
        """Return the job as clients see it."""
        return {
            "id": self.id,
            "object": "memory.job",
            "memory": self.name,
            "status": self.status,
            "progress": {"done": self.done, "total": self.total},
            "tokens": self.tokens,
            "error": None if self.error is None else {"message": self.error, "type": "job_error"},
            "created": self.created,
            "finished": self.finished,
        }


@final
class JobBoard:
    """The jobs of one server. All methods are called in the event loop."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def begin(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """Let `work` run as `job`; ApiError when its name is being written already, or too many jobs wait."""
        pending = [each for each in self._jobs.values() if each.is_pending]
        try:
            if job.name in [each.name for each in pending]:
                raise ApiError(409, f"the memory {job.name!r} is being written already.", param="name")
            if len(pending) >= MOST_PENDING:
                raise ApiError(429, f"{len(pending)} memories wait to be written.", code="queue_full", retry_after=5)
        except ApiError:
            work.close()
            raise
        for old in [each.id for each in self._jobs.values() if not each.is_pending]:
            if len(self._jobs) < MOST_KEPT:
                break
            del self._jobs[old]
        self._jobs[job.id] = job
        job.task = asyncio.get_running_loop().create_task(work)

    def all(self) -> list[Job]:
        """Return the jobs, the latest first."""
        return list(reversed(self._jobs.values()))

    def get(self, number: str) -> Job:
        """Return one job; ApiError if there is none."""
        if number not in self._jobs:
            raise ApiError(404, f"there is no job {number!r:.100}; /v1/jobs lists them. A restart forgets jobs.")
        return self._jobs[number]

    def cancel(self, job: Job) -> None:
        """Give a job up; one that has ended stays as it is."""
        if job.ticket is not None:
            job.ticket.cancel()
        elif job.task is not None and job.is_pending:
            job.task.cancel()
            job.end("cancelled")

    async def drain(self, seconds: float) -> None:
        """Wait for jobs that have begun, at most so long; then give up what is left."""
        tasks = [job.task for job in self._jobs.values() if job.is_pending and job.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=max(seconds, 0.001))
        for job in self._jobs.values():
            self.cancel(job)
