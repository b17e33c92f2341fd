"""One replica: an engine behind the routes of `memdlm serve`, called by the front instead of by clients."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, final

from ray import serve
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from memdlm.inference import GenerationConfig
from memdlm.memory import MemoryConfig
from memdlm.serving.http.app import routed
from memdlm.serving.http.building import service_of
from memdlm.serving.http.errors import ApiError, refused
from memdlm.serving.http.service import Service
from memdlm.serving.ray_app.options import RayOptions

log = logging.getLogger("memdlm.serving")
HERE, ELSEWHERE, NONE = "here", "elsewhere", "none"
"""Where a request's memory was when it came: on this replica's device, not there, or the request names none."""
PAUSE = 0.2
"""Seconds between two looks at a job."""


@final
class Held:
    """One memory, as Ray Serve counts it; when Serve lets go of it, so does the engine."""

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget: Callable[[], None] | None = forget

    def __del__(self) -> None:
        # Serve calls this, and then Python may: by then another copy may be in use.
        forget, self._forget = self._forget, None
        if forget is not None:
            forget()


@final
class Replica:
    """Answers the front's calls. The messages that it yields are ASGI's, after one that says who answers."""

    service: Service | None = None

    def __init__(self, options: RayOptions, config: GenerationConfig, memory: MemoryConfig | None) -> None:
        self.service = service_of(options, config, memory, log.info, None)
        self._app = routed(self.service)
        self.name = serve.get_replica_context().replica_id.unique_id
        engine = self.service.engine

        async def held(name: str) -> Held:
            return Held(lambda: engine.forget(name))

        # Serve counts memories; the engine loads one with the first request that reads it.
        self._held = serve.multiplexed(held, max_num_models_per_replica=options.memories_per_replica)
        self.service.start()

    def check_health(self) -> None:
        """Raise when the engine has stopped: Serve then starts another replica."""
        if self.service is None or not self.service.is_alive():
            raise RuntimeError("the engine has stopped")

    async def ask(self, name: str | None, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """Answer one request that reads the memory `name`."""
        yield {"type": "memdlm.replica", "replica": self.name, "memory": await self._found(name)}
        async with contextlib.aclosing(self._answered(scope, body)) as messages:
            async for message in messages:
                yield message

    async def write(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """Answer one request that makes a memory, then yield how its job goes; who stops listening gives the job up."""
        assert self.service is not None
        yield {"type": "memdlm.replica", "replica": self.name, "memory": NONE}
        status, told = 0, b""
        async with contextlib.aclosing(self._answered(scope, body)) as messages:
            async for message in messages:
                status = message.get("status", status)
                told += message.get("body", b"")
                yield message
        if status != 202:
            return
        job = self.service.jobs.get(json.loads(told)["id"])
        try:
            while True:
                is_pending = job.is_pending
                yield {"type": "memdlm.job", "job": job.told()}
                if not is_pending:
                    return
                await asyncio.sleep(PAUSE)
        finally:
            self.service.jobs.cancel(job)

    async def _found(self, name: str | None) -> str:
        """Say where the memory is now, and have Serve count it as here from now on."""
        assert self.service is not None
        if name is None or self.service.shelf is None:
            return NONE
        found = HERE if self.service.engine.holds(name) else ELSEWHERE
        with contextlib.suppress(ApiError):  # the routes say what is wrong
            await run_in_threadpool(self.service.shelf.stored_name, name)
            await self._held(name)
        return found

    async def _answered(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """Yield what the application sends. When nobody listens any more, it hears that its client went."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left, bodies = asyncio.Event(), [body]

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            has_begun = False

            async def send(message: Message) -> None:
                nonlocal has_begun
                has_begun = True
                await messages.put(message)

            try:
                await self._app(scope, receive, send)
            except Exception as error:  # an unforeseen one; Starlette has answered, unless it came too early
                told = refused(error)
                if not has_begun:
                    await told.reply()(scope, receive, send)
            finally:
                await messages.put(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            left.set()
            await asyncio.shield(running)

    def __del__(self) -> None:
        if self.service is not None:
            self.service.engine.stop()
