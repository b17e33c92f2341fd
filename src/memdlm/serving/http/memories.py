"""The routes of memories as resources: made from texts and files, listed, fetched, deleted."""

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import Response as HttpResponse
from starlette.responses import StreamingResponse

from memdlm.data.documents import READERS
from memdlm.errors import CancelledError, ConfigError, MemoryFileError, unknown
from memdlm.memory.files.saved import MemorySummary
from memdlm.models.networks.sizes import trained_positions
from memdlm.serving.http.errors import ApiError, Reply, refused
from memdlm.serving.http.jobs import Job, JobBoard
from memdlm.serving.http.schemas import NewMemory
from memdlm.serving.http.service import Service
from memdlm.serving.http.shelf import Served, Shelf, no_model
from memdlm.serving.http.store import check_name, pieces_of
from memdlm.serving.http.streams import events_of
from memdlm.serving.requests import Done, Failed, Progress, Started, WriteRequest
from memdlm.templates import message_ids, text_ids
from memdlm.version import __version__

FILE_FIELDS = ("name", "as_message", "overwrite", "seed")
UPLOAD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "A .txt, .md, .html or .pdf document."},
        "name": {"type": "string", "description": "Unset: the file's name without its suffix."},
        "as_message": {"type": "string", "enum": ["true", "false"]},
        "overwrite": {"type": "string", "enum": ["true", "false"]},
        "seed": {"type": "string"},
    },
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": NewMemory.model_json_schema()},
            "multipart/form-data": {"schema": UPLOAD_SCHEMA},
        },
    }
}
_TOLD = ("tokens", "source", "as_message", "loss_before", "loss_after", "memdlm")
"""What clients are told of a memory's provenance."""


def memory_routes(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["memories"])

    def shelf() -> Shelf:
        if service.shelf is None:
            raise ApiError(404, "this server has no memories; its operator can name a folder: memdlm serve --memories.")
        return service.shelf

    @routes.get("/v1/memories", response_model=None)
    async def list_memories() -> Reply:
        """List the stored memories, by name, and whether each is served."""
        if service.shelf is None:
            return Reply({"object": "list", "data": []})
        return Reply({"object": "list", "data": await run_in_threadpool(_all, service.shelf)})

    @routes.post("/v1/memories", response_model=None, status_code=202, openapi_extra=BODY)
    async def create_memory(request: Request) -> Reply:
        """Begin to write a text, or an uploaded document, into a memory; the answer is a job to follow."""
        service.check_writable()
        asked, data, filename = await _read(request, service)
        job = Job(name=asked.name)
        await run_in_threadpool(_check_free, service, asked)
        service.jobs.begin(job, _make(service, job, asked, data, filename))
        return Reply(job.told(), 202, headers={"Location": f"/v1/jobs/{job.id}"})

    @routes.get("/v1/memories/{name}", response_model=None)
    async def get_memory(name: str) -> Reply:
        """Describe one memory."""
        return Reply(await run_in_threadpool(_one, shelf(), name))

    @routes.get("/v1/memories/{name}/download", response_model=None)
    async def download_memory(name: str) -> HttpResponse:
        """Fetch one memory's files as a tar archive; what is unpacked is a folder that every command reads."""
        opened = await run_in_threadpool(_archive, shelf(), name)
        # Names of folders may have any characters; headers may not.
        plain = "".join(each if each.isascii() and (each.isalnum() or each in "._-") else "_" for each in name)
        headers = {"Content-Disposition": f'attachment; filename="{plain}.mem.tar"'}
        return StreamingResponse(pieces_of(opened), media_type="application/x-tar", headers=headers)

    @routes.delete("/v1/memories/{name}", response_model=None)
    async def delete_memory(name: str) -> Reply:
        """Delete one memory, its files included."""
        await run_in_threadpool(service.check_writable().delete, name)
        return Reply({"id": name, "object": "memory", "deleted": True})

    return routes


def job_routes(jobs: JobBoard, check_writable: Callable[[], object]) -> APIRouter:
    """Return the routes of jobs that write memories. `check_writable` raises ApiError where clients change nothing."""
    routes = APIRouter(tags=["memories"])

    @routes.get("/v1/jobs", response_model=None)
    async def list_jobs() -> Reply:
        """List the jobs that write memories, the latest first."""
        return Reply({"object": "list", "data": [job.told() for job in jobs.all()]})

    @routes.get("/v1/jobs/{number}", response_model=None)
    async def get_job(number: str) -> Reply:
        """Say how far one job has come."""
        return Reply(jobs.get(number).told())

    @routes.delete("/v1/jobs/{number}", response_model=None)
    async def cancel_job(number: str) -> Reply:
        """Give one job up; a memory that is written already stays."""
        check_writable()
        job = jobs.get(number)
        jobs.cancel(job)
        return Reply(job.told())

    return routes


async def _read(request: Request, service: Service) -> tuple[NewMemory, bytes | None, str | None]:
    """Return what is asked for, and an upload's bytes and name, if it is one."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "the body is no valid JSON.") from error
        return _checked(body), None, None
    if kind != "multipart/form-data":
        raise ApiError(415, "send application/json with name and text, or multipart/form-data with a file.")
    try:
        form = await request.form(max_files=1, max_fields=len(FILE_FIELDS), max_part_size=2**12)
    except (MultiPartException, UnicodeError, KeyError) as error:
        raise ApiError(400, f"the form cannot be read: {error}.") from error
    async with _closing(form):
        file = form.get("file")
        fields: dict[str, Any] = {name: value for name, value in form.multi_items() if name != "file"}
        if not isinstance(file, UploadFile):
            raise ApiError(400, "file: this part must be an uploaded document.", param="file")
        filename = Path((file.filename or "").replace("\\", "/")).name[:200]
        suffix = Path(filename).suffix.lower()
        if suffix not in READERS:
            raise ApiError(400, unknown("file: a document with suffix", suffix, READERS), param="file")
        fields.setdefault("name", Path(filename).stem)
        for name in ("as_message", "overwrite"):
            if name in fields:
                fields[name] = {"true": True, "false": False}.get(str(fields[name]).lower(), fields[name])
        if str(fields.get("seed", "")).lstrip("-").isdecimal() and len(str(fields["seed"])) < 20:
            fields["seed"] = int(fields["seed"])
        data = await file.read()
    return _checked({**fields, "text": "?"}), data, filename


class _closing:  # noqa: N801
    """Closes a form's files at the end of a block."""

    def __init__(self, form: Any) -> None:
        self.form = form

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *error: object) -> None:
        await self.form.close()


def _checked(body: Any) -> NewMemory:
    try:
        asked = NewMemory.model_validate(body)
        check_name(asked.name)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    except ConfigError as error:
        raise ApiError(400, str(error), param="name") from error
    return asked


def _check_free(service: Service, asked: NewMemory) -> None:
    """Raise ApiError when the name is taken, or the store has no room."""
    shelf = service.check_writable()
    stored = shelf.store.names()
    if asked.name in (service.base, service.root):
        raise ApiError(400, f"{asked.name!r} is the name of the model; choose another.", param="name")
    if shelf.is_alias(asked.name):
        raise ApiError(409, f"{asked.name!r} is another name of a loaded memory; unload that first.", param="name")
    if asked.name in stored and not asked.overwrite:
        raise ApiError(409, f"the memory {asked.name!r} exists; choose another name, or set overwrite.", param="name")
    if asked.name not in stored and len(stored) >= service.options.max_stored:
        raise ApiError(403, f"{len(stored)} memories are stored, the most that this server keeps; delete some.")


async def _make(service: Service, job: Job, asked: NewMemory, data: bytes | None, filename: str | None) -> None:
    """Do one job: read the upload, hand the text to the engine, and follow the write."""
    try:
        text, source = asked.text, {"source_sha256": hashlib.sha256(asked.text.encode()).hexdigest()}
        if data is not None:
            job.status = "reading"
            document = await service.reader.read(data, filename or "")
            text, source = document.text, {"source": document.name, "source_sha256": document.sha256}
        request = await asyncio.to_thread(_request, service, asked, text, source)
        job.tokens = len(request.ids)
        job.status = "queued"
        job.ticket = await _queued(service, request)
        async for told in events_of([job.ticket], float("inf")):
            event = None if told is None else told[1]
            if isinstance(event, Started):
                job.status = "writing"
            elif isinstance(event, Progress):
                job.done, job.total = event.done, event.total
            elif isinstance(event, Done):
                if service.shelf is not None:
                    service.shelf.shown(asked.name)
                job.end("done")
            elif isinstance(event, Failed):
                is_given_up = isinstance(event.error, CancelledError)
                job.end("cancelled" if is_given_up else "failed", None if is_given_up else refused(event.error).detail)
    except asyncio.CancelledError:
        job.end("cancelled")
    except Exception as error:
        # A job has no client that waits: what is wrong stands in the job, and the unforeseen also in the log.
        job.end("failed", refused(error).detail)


async def _queued(service: Service, request: WriteRequest) -> Any:
    """Hand a write to the engine, as soon as its queue has room."""
    while True:
        try:
            return await service.queue(request)
        except ApiError as error:
            if error.status_code != 429:
                raise
        await asyncio.sleep(1)


def _request(service: Service, asked: NewMemory, text: str, source: Mapping[str, str]) -> WriteRequest:
    decoder = service.engine.decoder
    with service._encoding:
        if asked.as_message:
            ids = message_ids(decoder.tokenizer, [{"role": "user", "content": text}])
        else:
            ids = text_ids(decoder.tokenizer, text)
    most = service.options.max_text_tokens
    if not ids or len(ids) > most:
        raise ApiError(400, f"text: it has {len(ids)} tokens; from 1 to {most} become a memory here.", param="text")
    config, places = service.memory, trained_positions(decoder.model)
    if config.chunk_length is None and places is not None and len(ids) > places:
        config = dataclasses.replace(config, chunk_length=places)
    noted = {**source, "as_message": asked.as_message, "seed": asked.seed, "memdlm": __version__}
    return WriteRequest(ids=ids, memory=asked.name, config=config, seed=asked.seed, provenance=noted)


def _all(shelf: Shelf) -> list[dict[str, Any]]:
    served = shelf.served()
    found = []
    for name in shelf.store.names():
        try:
            found.append(_told(name, shelf.store.describe(name), served))
        except MemoryFileError:  # deleted meanwhile
            continue
    return found


def _one(shelf: Shelf, name: str) -> dict[str, Any]:
    try:
        return _told(name, shelf.store.describe(name), shelf.served())
    except MemoryFileError as error:
        raise no_model(name) from error


def _archive(shelf: Shelf, name: str) -> Any:
    try:
        return shelf.store.archive(name)
    except (MemoryFileError, OSError) as error:
        raise no_model(name) from error


def _told(name: str, found: MemorySummary, served: list[Served]) -> dict[str, Any]:
    facts = {each: found.provenance[each] for each in _TOLD if each in found.provenance}
    if isinstance(facts.get("source"), str):
        facts["source"] = Path(facts["source"]).name  # a path of this machine is nobody's business
    return {
        "id": name,
        "object": "memory",
        "served_as": [each.name for each in served if each.stored == name],
        "problem": found.problem,
        "rank": found.rank,
        "bytes": found.num_bytes,
        "parameters": found.num_parameters,
        **facts,
    }
