"""What every request passes before a route sees it: who asks, from where, how much, and how fast."""

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memdlm.serving.http.errors import ApiError
from memdlm.serving.http.options import LOCAL_NAMES, Secret

OPEN = {"/", "/page.css", "/page.js", "/health", "/ready"}
"""Paths that need no key: the page without its data, and whether the server lives."""
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Headers of every response that does not set them itself."""


@final
class Guard:
    """The outermost application: refuses, limits, and adds headers."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: Secret | None,
        host: str,
        limit_of: Callable[[str, str], int],
        body_seconds: float,
        is_draining: Callable[[], bool],
    ) -> None:
        self.app, self.key, self.host = app, key, host
        self.limit_of, self.body_seconds, self.is_draining = limit_of, body_seconds, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            # There are no web sockets; lifespan events pass.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in ALWAYS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._admit(scope)
            kind = Headers(scope=scope).get("content-type", "").lower()
            limited = _Limited(scope, receive, self.limit_of(scope["path"], kind), self.body_seconds)
        except ApiError as error:
            await error.reply()(scope, receive, sending)
            return
        await self.app(scope, limited, sending)

    def _admit(self, scope: Scope) -> None:
        """Raise ApiError unless the client may ask this."""
        path, headers = scope["path"], Headers(scope=scope)
        if self.key is not None:
            if path not in OPEN and not _is_key(headers.get("authorization", ""), self.key):
                raise ApiError(
                    401,
                    "this server needs its API key: send `Authorization: Bearer KEY`.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif path not in OPEN or headers.get("origin") is not None:
            self._refuse_foreign_pages(headers)
        if self.is_draining() and path not in ("/health", "/ready", "/metrics"):
            raise ApiError(503, "the server is shutting down; ask again soon.", retry_after=5)

    def _refuse_foreign_pages(self, headers: Headers) -> None:
        """Without a key, keep web sites out that a browser on this machine shows.

        Such a site may send requests to this address, or have its own name lead here. Both show in the headers.
        """
        name = _host_name(headers.get("host", ""))
        if name not in (self.host, *LOCAL_NAMES, "127.0.0.1", "::1"):
            raise ApiError(
                403, "the Host header is not this server's address; only a server with an API key has other names."
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(403, "pages of other web sites may not use this server.")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "pages of other web sites may not use this server.")


def of_this_machine(app: ASGIApp) -> ASGIApp:
    """Return `app` for clients on this machine alone; others, and those without an address, are refused."""

    async def local(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope.get("client") or ("",))[0] not in ("127.0.0.1", "::1"):
            why = "without an API key, only clients on this machine are answered; the operator can set one."
            await ApiError(403, why).reply()(scope, receive, send)
            return
        await app(scope, receive, send)

    return local


def _is_key(header: str, key: Secret) -> bool:
    scheme, _, given = header.partition(" ")
    # Compared in constant time, so that the time of an answer says nothing about the key.
    return hmac.compare_digest(given.strip().encode(), key.value.encode()) and scheme.lower() == "bearer"


def _host_name(header: str) -> str:
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


class _Limited:
    """Receives a body of at most so many bytes within so many seconds."""

    def __init__(self, scope: Scope, receive: Receive, limit: int, seconds: float) -> None:
        self.receive, self.limit, self.seconds = receive, limit, seconds
        self.count, self.end, self.is_whole = 0, time.monotonic() + seconds, False
        said = Headers(scope=scope).get("content-length", "0")
        # HTTP has no signs and no digits of other scripts here.
        if not (said.isascii() and said.isdigit()):
            raise ApiError(400, "Content-Length is no number.")
        if len(said) > 18 or int(said) > limit:
            raise self._too_large()

    async def __call__(self) -> Message:
        if self.is_whole:
            return await self.receive()
        left = self.end - time.monotonic()
        try:
            message = await asyncio.wait_for(self.receive(), max(left, 0.001))
        except asyncio.TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {self.seconds:g} seconds.", headers={"Connection": "close"}
            ) from error
        if message["type"] == "http.request":
            self.count += len(message.get("body", b""))
            self.is_whole = not message.get("more_body", False)
            if self.count > self.limit:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.limit / 2**20:g} MiB, this server's limit.",
            headers={"Connection": "close"},
        )
