"""A submitted job, as its owner sees it: events, the result, and a way to give it up."""

import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import final

from memdlm.errors import CancelledError
from memdlm.serving.requests import Done, Event, Failed, GenerationRequest, Memorized, Response, Started, WriteRequest

Listener = Callable[[Event], None]
_NUMBERS = itertools.count(1)


@final
class Ticket:
    """One submitted job. All methods may be called from any thread."""

    def __init__(self, request: GenerationRequest | WriteRequest) -> None:
        self.request = request
        self.number = next(_NUMBERS)
        """Counts the jobs of the process."""
        self.submitted = time.monotonic()
        self.started: float | None = None
        self._events: list[Event] = []
        self._listeners: list[Listener] = []
        self._changed = threading.Condition()
        self._is_cancelled = False

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield all events from the first on, and end after `Done` or `Failed`.

        Raises TimeoutError when the next one does not come within `timeout` seconds.
        """
        for place in itertools.count():
            with self._changed:
                if not self._changed.wait_for(partial(self._has, place), timeout):
                    raise TimeoutError(f"job {self.number}: no event within {timeout} seconds.")
                event = self._events[place]
            yield event
            if isinstance(event, (Done, Failed)):
                return

    def _has(self, place: int) -> bool:
        return len(self._events) > place

    def add_listener(self, listener: Listener) -> None:
        """Let `listener` be called with every event: here with those so far, then in the engine's thread.

        It must return at once: all responses wait for it. One that raises is warned about, and not called again.
        """
        with self._changed:
            for event in self._events:
                listener(event)
            self._listeners.append(listener)

    def cancel(self) -> None:
        """Give the job up: its slot is free at the next step; a write ends at the next gradient."""
        self._is_cancelled = True

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or an error."""
        return bool(self._events) and isinstance(self._events[-1], (Done, Failed))

    @property
    def error(self) -> Exception | None:
        """The error with which the job ended; None: it has not ended, or it has a result."""
        last = self._events[-1] if self._events else None
        return last.error if isinstance(last, Failed) else None

    def result(self, timeout: float | None = None) -> Response | Memorized:
        """Wait for the result; raises the job's error, CancelledError, or TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError(f"job {self.number}: no result within {timeout} seconds.")
            last = self._events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Done)
        return last.result

    def tell(self, event: Event) -> None:
        """Append an event; the engine's part."""
        with self._changed:
            if self.is_done:
                return
            if isinstance(event, Started):
                self.started = time.monotonic()
            self._events.append(event)
            for listener in list(self._listeners):
                try:
                    listener(event)
                except Exception as error:  # the job is not at fault, and neither are the others
                    self._listeners.remove(listener)
                    warnings.warn(f"job {self.number}: a listener raised {error!r} and is not called again.")
            self._changed.notify_all()

    def seconds(self) -> tuple[float, float]:
        """Return how long the job waited, and for how long it has run."""
        now = time.monotonic()
        started = now if self.started is None else self.started
        return started - self.submitted, now - started


def cancelled(ticket: Ticket, why: str = "it was cancelled") -> Failed:
    """Return the last event of a job that was given up."""
    return Failed(error=CancelledError(f"job {ticket.number}: {why}."))
