"""The process: a uvicorn server whose clients must be quick, and that ends in good order."""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from memdlm.serving.http.app import build_app
from memdlm.serving.http.service import Service

log = logging.getLogger("uvicorn.error")
KEEP_ALIVE = 5
"""Most seconds for which a connection without a request stays open."""


def patient(seconds: float) -> type[H11Protocol]:
    """Return the protocol that gives a client so many seconds for the headers of a request."""

    class Patient(H11Protocol):
        """Closes connections whose headers do not arrive; uvicorn itself waits for ever."""

        _headers_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Begin to wait."""
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            """Take data, and wait for the rest of the headers, if they are not whole."""
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop waiting."""
            super().connection_lost(exc)
            self._unwatch()

        def _watch(self) -> None:
            is_idle = self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE
            is_new = self.cycle is None
            if is_idle and (is_new or bool(self.conn.trailing_data[0])):
                if self._headers_timer is None:
                    self._headers_timer = self.loop.call_later(seconds, self._close)
            else:
                self._unwatch()

        def _unwatch(self) -> None:
            if self._headers_timer is not None:
                self._headers_timer.cancel()
                self._headers_timer = None

        def _close(self) -> None:
            self._headers_timer = None
            if self.transport is not None and not self.transport.is_closing():
                self.transport.close()

    return Patient


class Server(uvicorn.Server):
    """uvicorn's server. A signal makes it refuse new work at once, and its end is an ordinary return."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM as uvicorn does, but do not raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in earlier.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second Ctrl-C ends the waiting."""
        self.service.is_draining = True
        super().handle_exit(sig, frame)


def _without_query(record: logging.LogRecord) -> bool:
    """Leave out what follows a path: clients put keys there, although they are not read from there."""
    if isinstance(record.args, tuple) and len(record.args) > 2:
        record.args = (*record.args[:2], str(record.args[2]).partition("?")[0], *record.args[3:])
    return True


def server_of(service: Service, app: ASGIApp | None = None) -> Server:
    """Return the server, ready to run."""
    options = service.options
    config: dict[str, Any] = {
        "host": options.host,
        "port": options.port,
        "http": patient(options.body_seconds),
        "ws": "none",
        "lifespan": "on",
        "log_level": "info",
        "access_log": options.access_log,
        "limit_concurrency": options.max_connections,
        "timeout_keep_alive": max(1, min(KEEP_ALIVE, round(options.body_seconds))),
        "timeout_graceful_shutdown": max(1, round(options.drain_seconds)),
        # Whoever speaks first with the server is the client: a proxy's word for another address is not asked for.
        "proxy_headers": False,
        "server_header": False,
        "date_header": True,
        "workers": 1,
    }
    server = Server(uvicorn.Config(build_app(service) if app is None else app, **config), service)
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    return server
