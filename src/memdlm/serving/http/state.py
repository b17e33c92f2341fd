"""The routes that say how the server is: /health, /ready, /metrics, and the page with what it needs to know."""

from pathlib import Path

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response as HttpResponse

from memdlm.serving.http.errors import ApiError, Reply
from memdlm.serving.http.service import Service
from memdlm.version import __version__

PAGE = Path(__file__).with_name("page")
KINDS = {"page.html": "text/html; charset=utf-8", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
"""What the page may do: run its own script and style, and ask this server. Nothing from elsewhere, nothing inline."""


def state_routes(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["server"])

    @routes.get("/health", response_model=None)
    async def health() -> HttpResponse:
        """Say that the process lives, and its engine's thread with it."""
        if not service.is_alive():
            raise ApiError(503, "the engine has stopped; restart the server.")
        return HttpResponse(status_code=200)

    @routes.get("/ready", response_model=None)
    async def ready() -> HttpResponse:
        """Say that requests are taken."""
        if service.is_draining or not service.is_alive():
            raise ApiError(503, "the server is shutting down.", retry_after=5)
        return HttpResponse(status_code=200)

    @routes.get("/metrics", response_model=None)
    async def metrics() -> HttpResponse:
        """Return the figures for Prometheus."""
        return HttpResponse(await run_in_threadpool(service.metrics.page), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/v1/server", response_model=None)
    async def server() -> Reply:
        """Say what this server is and allows, for the page and for clients that adapt to it."""
        options, now = service.options, service.engine.figures()
        return Reply(
            {
                "object": "server",
                "version": __version__,
                "model": service.base,
                "has_chat_template": service.has_template,
                "has_memories": service.shelf is not None,
                "read_only": options.read_only or service.shelf is None,
                "mask": str(service.engine.decoder.tokenizer.mask_token),
                "limits": {
                    "max_tokens": options.max_tokens,
                    "max_prompt_tokens": options.max_prompt_tokens,
                    "max_text_tokens": options.max_text_tokens,
                    "max_choices": options.max_choices,
                    "max_upload_mib": options.max_upload_mib,
                    "request_seconds": options.request_seconds,
                },
                "now": {
                    "running": now.running,
                    "waiting": now.waiting,
                    "writing": now.writing,
                    "slots": now.slots,
                    "live_memories": now.live_memories,
                    "memory_bytes": now.memory_bytes,
                },
            }
        )

    return routes


def page_routes(service: Service) -> APIRouter:
    """Return the page and its parts."""
    routes = APIRouter(include_in_schema=False)

    def asset(name: str) -> HttpResponse:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return HttpResponse((PAGE / name).read_bytes(), media_type=KINDS[name], headers=headers)

    @routes.get("/", response_model=None)
    async def page() -> HttpResponse:
        return asset("page.html")

    @routes.get("/page.css", response_model=None)
    async def style() -> HttpResponse:
        return asset("page.css")

    @routes.get("/page.js", response_model=None)
    async def script() -> HttpResponse:
        return asset("page.js")

    return routes
