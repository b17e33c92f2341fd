"""The routes that answer: /v1/chat/completions and /v1/completions, whole or as a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from memdlm.errors import CancelledError
from memdlm.inference.decoder import Decoder
from memdlm.inference.prompts import Prompt
from memdlm.serving.http.errors import ApiError, Reply, refused
from memdlm.serving.http.schemas import Asked, ChatRequest, CompletionRequest
from memdlm.serving.http.service import Choices, Service
from memdlm.serving.http.streams import (
    GONE,
    ClientGoneError,
    EventStream,
    Unfolding,
    event_text,
    events_of,
    unless_gone,
)
from memdlm.serving.requests import Done, Event, Failed, GenerationRequest, Response, Settled, Stepped
from memdlm.serving.tickets import Ticket
from memdlm.version import __version__

FINGERPRINT = f"memdlm-{__version__}"
DONE = "data: [DONE]\n\n"


class Shape(ABC):
    """How one route's answers look."""

    prefix: str
    whole: str
    """The `object` of a whole answer."""
    piece: str
    """The `object` of a part of a stream."""

    @abstractmethod
    def choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        """Return a whole choice."""

    @abstractmethod
    def delta(self, index: int, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """Return a part of a choice; the text is None in the first and the last."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what stands before the first part, if anything does."""


@final
class Chat(Shape):
    """Messages."""

    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        """Return a whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}

    def delta(self, index: int, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """Return a part of a choice."""
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the part that says who speaks."""
        return {**self.delta(index, None), "delta": {"role": "assistant", "content": ""}}


@final
class Completion(Shape):
    """Texts."""

    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        """Return a whole choice."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def delta(self, index: int, text: str | None, finish: str | None = None) -> dict[str, Any]:
        """Return a part of a choice."""
        return {"index": index, "text": text or "", "logprobs": None, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return nothing: a text begins with its first part."""
        return None


def finish_of(result: Response) -> str:
    """Return OpenAI's word for why an answer ended."""
    return "length" if result.finish == "length" else "stop"


def result_of(event: Event) -> Response:
    """Return the result that a last event brings; ApiError for a job that failed or was given up."""
    if isinstance(event, Done) and isinstance(event.result, Response):
        return event.result
    assert isinstance(event, Failed)
    if isinstance(event.error, CancelledError):
        raise ApiError(503, "the server is shutting down; ask again soon.", retry_after=5) from event.error
    raise refused(event.error) from event.error


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One request that was queued, and how its answer is told."""

    service: Service
    shape: Shape
    asked: Asked
    choices: Choices
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _frame(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.shape.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.choices.model,
            "system_fingerprint": FINGERPRINT,
            "choices": list(choices),
        }

    def _usage(self, results: Sequence[Response]) -> dict[str, Any]:
        completion = sum(len(each.ids) for each in results)
        prompt = self.choices.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def whole(self) -> dict[str, Any]:
        """Return the answer when all of it is there."""
        found: dict[int, Response] = {}
        try:
            async for told in events_of(self.choices.tickets, self.choices.end):
                if told is not None and isinstance(told[1], (Done, Failed)):
                    found[told[0]] = result_of(told[1])
        finally:
            self.choices.cancel()
        results = [found[place] for place in sorted(found)]
        choices = [self.shape.choice(place, each.text, finish_of(each)) for place, each in enumerate(results)]
        return {**self._frame(self.shape.whole, choices), "usage": self._usage(results)}

    async def stream(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; an error ends it with an event of its own."""
        try:
            async for text in self._pieces():
                yield text
        except ApiError as error:
            yield error.event()
        except Exception as error:
            # The status has been sent already. An unforeseen error is logged by `refused`.
            yield refused(error).event()
        finally:
            self.choices.cancel()

    async def _pieces(self) -> AsyncIterator[str]:
        decoder, shape, options = self.service.engine.decoder, self.shape, self.asked.stream_options
        has_usage = options is not None and options.include_usage
        stops = self.asked.stops
        texts = [Unfolding(decoder.tokenizer, _text_ends(decoder, each), stops) for each in self.choices.tickets]
        results: list[Response] = []

        def chunk(choice: dict[str, Any], **more: Any) -> str:
            # With usage, every other chunk says that it has none, as OpenAI's do.
            return event_text({**self._frame(shape.piece, [choice]), **({"usage": None} if has_usage else {}), **more})

        for place in range(len(texts)):
            opening = shape.opening(place)
            if opening is not None:
                yield chunk(opening)
        async for told in events_of(self.choices.tickets, self.choices.end):
            if told is None:
                yield ": waiting\n\n"
                continue
            place, event = told
            if isinstance(event, Stepped):
                changes = [[column, str(decoder.tokenizer.decode([each]))] for column, each in event.changes]
                yield chunk(shape.delta(place, None), memdlm={"block": event.block, "changes": changes})
            elif isinstance(event, Settled):
                piece = texts[place].more(event.ids)
                if piece:
                    yield chunk(shape.delta(place, piece))
            elif isinstance(event, (Done, Failed)):
                result = result_of(event)
                results.append(result)
                piece = texts[place].rest(result.text)
                if piece:
                    yield chunk(shape.delta(place, piece))
                yield chunk(shape.delta(place, None, finish_of(result)))
        if has_usage:
            yield event_text({**self._frame(shape.piece, []), "usage": self._usage(results)})
        yield DONE


async def _answered(
    request: Request, service: Service, shape: Shape, asked: Asked, prompts: Callable[[], Sequence[Prompt]]
) -> HttpResponse:
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream to be true.", param="stream_options")
    try:
        choices = await unless_gone(request, service.submit(asked, prompts()))
        answer = Answer(service=service, shape=shape, asked=asked, choices=choices)
        if asked.stream:
            return EventStream(answer.stream(), choices.cancel)
        return Reply(await unless_gone(request, answer.whole()))
    except ClientGoneError:
        return HttpResponse(status_code=GONE)


def answer_routes(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["answers"])

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatRequest) -> HttpResponse:
        """Answer a conversation; `stream` sends server-sent events as blocks of tokens become final."""
        if not service.has_template:
            raise ApiError(400, "this model's tokenizer has no chat template; ask /v1/completions.", param="messages")
        messages = [each.plain() for each in body.messages]
        return await _answered(request, service, Chat(), body, lambda: [messages])

    @routes.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> HttpResponse:
        """Continue texts or ids."""
        return await _answered(request, service, Completion(), body, lambda: body.prompts)

    return routes


def _text_ends(decoder: Decoder, ticket: Ticket) -> tuple[int, ...]:
    request = ticket.request
    assert isinstance(request, GenerationRequest)
    return decoder.configured(request.config).text_ends
