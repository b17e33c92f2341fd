"""From an engine's events to what a client reads: texts that grow, and server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, final

from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from memdlm.serving.http.errors import ApiError
from memdlm.serving.requests import Event
from memdlm.serving.responses import end_before
from memdlm.serving.tickets import Ticket

T = TypeVar("T")
PAUSE = 15.0
"""Seconds without an event after which a stream sends a comment, so that proxies keep the connection open."""
GONE = 499
"""What the log says of a client that went before its answer was ready, as nginx has it."""


class ClientGoneError(Exception):
    """The client closed its connection."""


@final
class Unfolding:
    """The text of one answer while its tokens become final, in pieces that are never taken back.

    Held back are characters of which bytes are missing, and the beginning of what may become a stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.ends, self.stops = tokenizer, frozenset(ends), tuple(stops)
        self.sent = ""
        self._ids: list[int] = []
        self._text, self._start, self._read, self._is_over = "", 0, 0, False

    def more(self, ids: Sequence[int]) -> str:
        """Take further ids; return the text that they add."""
        for each in ids:
            self._is_over = self._is_over or each in self.ends
            if not self._is_over:
                self._ids.append(each)
        # A window is decoded, from a place where a token began: the cost does not grow with the answer.
        before = self._decoded(self._ids[self._start : self._read])
        whole = self._decoded(self._ids[self._start :])
        if len(whole) > len(before) and not whole.endswith("\ufffd"):
            self._text += whole[len(before) :]
            self._start, self._read = self._read, len(self._ids)
        return self._send(self._text[: self._safe()])

    def rest(self, text: str) -> str:
        """Return what is left of the whole `text`."""
        return self._send(text)

    def _send(self, text: str) -> str:
        if not text.startswith(self.sent):  # a tokenizer that takes back what it wrote: nothing more until the end
            return ""
        piece = text[len(self.sent) :]
        self.sent = text
        return piece

    def _safe(self) -> int:
        """Return how much of the text can no longer become part of a stop text."""
        end = end_before(self._text, self.stops)
        if end is not None:
            return end
        held = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:size]):
                    held = size
                    break
        return len(self._text) - held

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


async def events_of(tickets: Sequence[Ticket], end: float) -> AsyncIterator[tuple[int, Event] | None]:
    """Yield the events of several jobs with their places, as they come; None after a pause.

    Raises ApiError with status 504 when the time is over.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
    left = len(tickets)

    def listener(place: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed: the server has stopped
                loop.call_soon_threadsafe(queue.put_nowait, (place, event))

        return tell

    for place, ticket in enumerate(tickets):
        ticket.add_listener(listener(place))
    while left:
        seconds = min(PAUSE, end - time.monotonic())
        try:
            place, event = await asyncio.wait_for(queue.get(), max(seconds, 0.001))
        except asyncio.TimeoutError as error:
            if time.monotonic() >= end:
                raise ApiError(504, "the request's time on this server is over.", code="timeout") from error
            yield None
            continue
        left -= type(event).__name__ in ("Done", "Failed")
        yield place, event


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`; when the client goes before, `work` is cancelled and ClientGoneError raised."""
    working, going = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _ended(working, going)


async def _ended(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event_text(value: Any) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


@final
class EventStream(HttpResponse):
    """Server-sent events; the source is closed when it ends, and when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        # Proxies such as nginx would collect the events otherwise.
        super().__init__(headers={"X-Accel-Buffering": "no", "Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.source, self.on_end = source, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; `on_end` is called however that ends."""
        pumping, going = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({pumping, going}, return_when=asyncio.FIRST_COMPLETED)
            if pumping.done():
                pumping.result()
        except OSError:  # the connection broke while something was sent
            pass
        finally:
            self.on_end()
            await _ended(pumping, going)

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for text in self.source:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self.source.aclose()  # type: ignore[attr-defined]
