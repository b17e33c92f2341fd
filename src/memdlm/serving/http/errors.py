"""Errors in OpenAI's form, and what an exception of ours means to a client."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from memdlm.errors import ConfigError, DataError, MemDLMError, MemoryFileError
from memdlm.terminal import json_text, one_line

log = logging.getLogger("memdlm.serving")
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""OpenAI's `type`, by status."""
THEIR_FAULT = (ConfigError, DataError, MemoryFileError)


class Reply(JSONResponse):
    """JSON that any text can be put into, halves of surrogate pairs included."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json_text(content).encode()


class ApiError(HTTPException):
    """What a client is told, by status. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        more = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers={**(headers or {}), **more})
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = KINDS.get(self.status_code, "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def reply(self) -> Reply:
        """Return the response."""
        return Reply(self.body, self.status_code, headers=dict(self.headers or {}))

    def event(self) -> str:
        """Return the error as an event of a stream that has begun."""
        return f"data: {json.dumps(self.body)}\n\n"


def refused(error: BaseException) -> ApiError:
    """Return what `error` means to the client; the log gets what only the operator may know."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, THEIR_FAULT):
        return ApiError(400, one_line(str(error)))
    if isinstance(error, MemDLMError):
        log.error("%s: %s", type(error).__name__, error)
        return ApiError(500, "the model or the machine failed at this request; the server's log says why.")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why.")


def _invalid(error: RequestValidationError) -> ApiError:
    """Turn pydantic's list into one sentence about the first field; the value itself is not repeated."""
    first = error.errors()[0]
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path")]
    if first.get("type") == "json_invalid":
        return ApiError(400, "the body is no valid JSON.")
    name = ".".join(place)[:100]
    what = f"{name}: " if name else ""
    code = "unknown_parameter" if first.get("type") == "extra_forbidden" else None
    message = "this server does not have this field." if code else f"{first.get('msg', 'not valid')}."
    return ApiError(400, one_line(what + message), param=name or None, code=code)


def add_handlers(app: FastAPI) -> None:
    """Let every error of `app` leave in OpenAI's form."""

    async def http(request: Request, error: Exception) -> Reply:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.reply()
        told = ApiError(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers
        )
        return told.reply()

    async def invalid(request: Request, error: Exception) -> Reply:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).reply()

    async def ours(request: Request, error: Exception) -> Reply:
        return refused(error).reply()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(MemDLMError, ours)
    app.add_exception_handler(RecursionError, ours)
