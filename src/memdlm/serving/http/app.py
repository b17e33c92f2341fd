"""The application: routes, errors and guards put together."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from memdlm.serving.http.adapters import adapter_routes
from memdlm.serving.http.answers import answer_routes
from memdlm.serving.http.errors import add_handlers
from memdlm.serving.http.guards import Guard
from memdlm.serving.http.memories import job_routes, memory_routes
from memdlm.serving.http.options import Secret, ServerOptions
from memdlm.serving.http.service import Service
from memdlm.serving.http.state import page_routes, state_routes
from memdlm.version import __version__

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def build_app(service: Service) -> ASGIApp:
    """Return the whole application of one server; the engine runs from its start to its end."""
    return guarded(routed(service), service.options, service.key, lambda: service.is_draining)


def guarded(app: ASGIApp, options: ServerOptions, key: Secret | None, is_draining: Callable[[], bool]) -> ASGIApp:
    """Return the application behind its guards."""
    mib = 2**20

    def limit_of(path: str, kind: str) -> int:
        is_upload = path == "/v1/memories" and kind.startswith("multipart/form-data")
        return (options.max_upload_mib if is_upload else options.max_body_mib) * mib

    return Guard(
        app,
        key=key,
        host=options.host.lower(),
        limit_of=limit_of,
        body_seconds=options.body_seconds,
        is_draining=is_draining,
    )


def routed(service: Service) -> FastAPI:
    """Return the application without its guards."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(service.start)
        yield
        await service.stop()

    app = FastAPI(
        title="memdlm",
        version=__version__,
        description="Masked diffusion language models with memories, under OpenAI's routes.",
        lifespan=lifespan,
        # The pages of /docs load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    add_handlers(app)
    for routes in (answer_routes, adapter_routes, memory_routes, state_routes, page_routes):
        app.include_router(routes(service))
    app.include_router(job_routes(service.jobs, service.check_writable))
    plain = app.openapi
    app.openapi = lambda: _described(plain())  # type: ignore[method-assign]
    return app


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """Say in the schema what errors look like; FastAPI would promise its own form, with status 422."""
    schema.setdefault("components", {}).setdefault("schemas", {})["Error"] = ERROR
    told = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = told
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema
