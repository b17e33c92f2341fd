"""The front: guards requests, reads which memory each names, and passes it to a replica that has the memory."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, final

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memdlm.serving.http.app import guarded
from memdlm.serving.http.errors import ApiError, add_handlers, refused
from memdlm.serving.http.guards import of_this_machine
from memdlm.serving.http.jobs import Job, JobBoard
from memdlm.serving.http.memories import job_routes
from memdlm.serving.http.options import api_key
from memdlm.serving.http.service import memory_named
from memdlm.serving.http.streams import gone
from memdlm.serving.ray_app.options import RayOptions

PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
ANSWERS = ("/v1/chat/completions", "/v1/completions")
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@final
class Front:
    """The deployment that Serve sends all requests to. There is one; it keeps the jobs of all replicas."""

    def __init__(self, options: RayOptions, replicas: DeploymentHandle) -> None:
        self.options, self.key = options, api_key(options)
        self._replicas = replicas.options(stream=True)
        self._jobs = JobBoard()
        self._registry = CollectorRegistry()
        self._count = Counter(
            "memdlm:routed_requests",
            "Requests, by replica, and by where their memory was when they came: here (on the replica's device), "
            "elsewhere, or none is read.",
            ["replica", "memory"],
            registry=self._registry,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, as Serve asks for it."""
        app = FastAPI(title="memdlm", docs_url=None, redoc_url=None, openapi_url=None)
        add_handlers(app)
        app.include_router(job_routes(self._jobs, self._check_writable))

        @app.get("/metrics", response_model=None)
        async def metrics() -> HttpResponse:
            return HttpResponse(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

        @app.post("/v1/load_lora_adapter", response_model=None)
        @app.post("/v1/unload_lora_adapter", response_model=None)
        async def adapters() -> HttpResponse:
            raise ApiError(
                404, "replicas share one store, and no list of names beside it: loading and unloading is not served."
            )

        @app.post("/v1/memories", response_model=None)
        async def create(request: Request) -> HttpResponse:
            body = await request.body()
            return await self._begun(self._replicas.write.remote(_passed(request.scope), body))

        @app.api_route("/{path:path}", methods=METHODS, response_model=None)
        async def others(request: Request) -> HttpResponse:
            body = await request.body()
            name = self._memory_of(body) if request.url.path in ANSWERS else None
            handle = self._replicas
            if name is not None and self.options.routed_by_memory:
                handle = handle.options(multiplexed_model_id=name)
            return Passed(self, handle.ask.remote(name, _passed(request.scope), body))

        inner = guarded(app, self.options, self.key, lambda: False)
        # Serve, not this server, chooses the address to listen on.
        return inner if self.key is not None else of_this_machine(inner)

    def _check_writable(self) -> None:
        if self.options.read_only or self.options.memories is None:
            raise ApiError(403, "clients may not change this server's memories.")

    def _memory_of(self, body: bytes) -> str | None:
        """Return the memory that a body names; None also for a body in which the replica will find a fault."""
        with suppress(ValueError, RecursionError, ApiError):
            asked = json.loads(body)
            model, memory = (asked.get("model"), asked.get("memory")) if isinstance(asked, dict) else (None, None)
            if isinstance(model, str) and isinstance(memory, str | None):
                named = memory_named(model, memory, self.options.name, str(self.options.model))
                return named if named and len(named) <= 512 else None
        return None

    async def messages(self, call: DeploymentResponseGenerator) -> AsyncGenerator[Message, None]:
        """Yield what a replica says; ApiError when no replica takes the request."""
        try:
            async for message in call:
                if message["type"] == "memdlm.replica":
                    self._count.labels(message["replica"], message["memory"]).inc()
                yield message
        except BackPressureError as error:
            raise ApiError(429, "all replicas are busy; ask again soon.", code="queue_full", retry_after=5) from error
        except (DeploymentUnavailableError, RayActorError) as error:
            raise ApiError(503, "no replica is there to answer; ask again soon.", retry_after=5) from error
        finally:
            call.cancel()

    async def _begun(self, call: DeploymentResponseGenerator) -> HttpResponse:
        """Return the answer to a request that makes a memory, and follow the job that it began."""
        status, headers, body = 500, [], b""
        messages = self.messages(call)
        try:
            async for message in messages:
                if message["type"] == "http.response.start":
                    status, headers = message["status"], message["headers"]
                body += message.get("body", b"")
                if _is_last(message):
                    break
        except Exception as error:
            raise refused(error) from error
        if status == 202:
            told = json.loads(body)
            job = Job(name=told["memory"], id=told["id"])
            try:
                self._jobs.begin(job, _followed(job, messages))
            except ApiError:  # another replica writes this name, or too many wait: the job ends with its call
                await messages.aclose()
                raise
        else:
            await messages.aclose()
        answer = HttpResponse(body, status)
        answer.raw_headers = headers
        return answer


@final
class Passed(HttpResponse):
    """A replica's answer, passed on as it comes; when the client goes, the replica hears of it."""

    def __init__(self, front: Front, call: DeploymentResponseGenerator) -> None:
        super().__init__()
        self.front, self.call = front, call
        self._is_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        passing, going = asyncio.ensure_future(self._pass(scope, receive, send)), asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({passing, going}, return_when=asyncio.FIRST_COMPLETED)
            # After its last byte, an answer's client counts as gone too.
            if passing.done() or self._is_over:
                await passing
        finally:
            if not passing.done():
                self.call.cancel()
                passing.cancel()
            going.cancel()
            await asyncio.gather(passing, going, return_exceptions=True)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun, more = False, []
        try:
            async with aclosing(self.front.messages(self.call)) as messages:
                async for message in messages:
                    if message["type"] == "memdlm.replica":
                        more = [(f"x-memdlm-{name}".encode(), message[name].encode()) for name in ("replica", "memory")]
                        continue
                    if message["type"] == "http.response.start":
                        message, has_begun = {**message, "headers": [*message["headers"], *more]}, True
                    self._is_over = _is_last(message)
                    await send(message)
        except RequestCancelledError:  # the client has gone
            pass
        except Exception as error:
            told = refused(error)
            if not has_begun:
                await told.reply()(scope, receive, send)
            elif not self._is_over:  # the status has been sent: the last event says what is wrong
                await send({"type": "http.response.body", "body": told.event().encode(), "more_body": False})


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def _followed(job: Job, messages: AsyncGenerator[Message, None]) -> None:
    """Copy what a replica says about a job, to its end."""
    try:
        async for message in messages:
            told = message.get("job")
            if told is None:
                continue
            job.done, job.total, job.tokens = told["progress"]["done"], told["progress"]["total"], told["tokens"]
            if told["finished"] is None:
                job.status = told["status"]
            else:
                job.end(told["status"], None if told["error"] is None else told["error"]["message"])
    except Exception as error:
        job.end("failed", refused(error).detail)
    finally:
        await messages.aclose()
        job.end("cancelled")


def _passed(scope: Scope) -> dict[str, Any]:
    """Return what a replica needs to know of a request; the key stays here."""
    found = {name: scope[name] for name in PASSED if name in scope}
    headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
    return {**found, "headers": headers, "client": None, "server": None}
