"""The routes that vLLM has for adapters, for memories: /v1/models, and loading and unloading by name."""

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse

from memdlm.serving.http.errors import Reply
from memdlm.serving.http.schemas import LoadAdapter, UnloadAdapter
from memdlm.serving.http.service import Service
from memdlm.serving.http.shelf import no_model


def adapter_routes(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["models"])

    def card(name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "memdlm",
            "root": root,
            "parent": parent,
        }

    def cards() -> list[dict[str, Any]]:
        served = [] if service.shelf is None else service.shelf.served()
        memories = [card(each.name, each.place, service.base) for each in served]
        return [card(service.base, service.root, None), *memories]

    @routes.get("/v1/models", response_model=None)
    async def list_models() -> Reply:
        """List the model, then the memories."""
        return Reply({"object": "list", "data": await run_in_threadpool(cards)})

    @routes.get("/v1/models/{name:path}", response_model=None)
    async def get_model(name: str) -> Reply:
        """Describe the model or one memory."""
        found = [each for each in await run_in_threadpool(cards) if each["id"] == name.removeprefix(f"{service.base}:")]
        if not found:
            raise no_model(name)
        return Reply(found[0])

    @routes.post("/v1/load_lora_adapter", response_model=None)
    async def load_lora_adapter(body: LoadAdapter) -> PlainTextResponse:
        """Serve a stored memory under a name."""
        shelf = service.check_writable()
        await run_in_threadpool(shelf.load, body.lora_name, body.lora_path, in_place=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{_shown(body.lora_name)}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", response_model=None)
    async def unload_lora_adapter(body: UnloadAdapter) -> PlainTextResponse:
        """Serve a memory no more; its files stay, and a restart serves it again."""
        await run_in_threadpool(service.check_writable().unload, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{_shown(body.lora_name)}' removed successfully.")

    return routes


def _shown(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()
