"""What all routes share: the engine, what it is called, what it may be asked, and how a request becomes a job."""

import asyncio
import dataclasses
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from memdlm.errors import DataError, EngineFullError, MemDLMError
from memdlm.inference import GenerationConfig
from memdlm.inference.prompts import Prompt, encode_prompts
from memdlm.memory import MemoryConfig
from memdlm.models.networks.checking import vocabulary_of
from memdlm.randomness import number_of
from memdlm.serving.engine import Engine
from memdlm.serving.http.errors import ApiError, refused
from memdlm.serving.http.jobs import JobBoard
from memdlm.serving.http.metrics import Metrics
from memdlm.serving.http.options import Secret, ServerOptions
from memdlm.serving.http.reading import UploadReader
from memdlm.serving.http.schemas import Asked
from memdlm.serving.http.shelf import Shelf
from memdlm.serving.requests import GenerationRequest, WriteRequest
from memdlm.serving.tickets import Ticket

_FREE = ("editing_threshold", "num_to_transfer", "factor", "max_post_steps", "stable_steps")
RIVALS: Mapping[str, tuple[str, ...]] = {
    "steps": ("steps_per_block", *_FREE),
    "steps_per_block": ("steps", *_FREE),
    "threshold": ("factor",),
    "factor": ("threshold", "num_to_transfer", "steps", "steps_per_block", "minimal_topk"),
    "editing_threshold": ("factor", "steps", "steps_per_block", "minimal_topk"),
    "num_to_transfer": ("factor", "steps", "steps_per_block", "minimal_topk"),
}
"""What a request sets -> the server's defaults that give way to it, because both together are not possible."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What one request asks for: the jobs, and what a client is told about them."""

    tickets: list[Ticket]
    model: str
    """The name that the client gave."""
    prompt_tokens: int
    end: float
    """When the request's time is over, on the clock of `time.monotonic`."""

    def cancel(self) -> None:
        """Free every slot that is still taken."""
        for ticket in self.tickets:
            if not ticket.is_done:
                ticket.cancel()


@final
@dataclass(kw_only=True, slots=True)
class Service:
    """One server's parts."""

    engine: Engine
    options: ServerOptions
    base: str
    """The model's name in requests."""
    root: str
    """The model as the operator named it."""
    key: Secret | None = None
    shelf: Shelf | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """How clients' texts are written."""
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    metrics: Metrics = field(init=False)
    reader: UploadReader = field(init=False)
    jobs: JobBoard = field(init=False)
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine, self.base)
        self.reader = UploadReader(self.options.upload_seconds)
        self.jobs = JobBoard()

    @property
    def defaults(self) -> GenerationConfig:
        """How answers are decoded where a request does not say."""
        return self.engine.decoder.config

    @property
    def has_template(self) -> bool:
        """Whether conversations can be answered."""
        return self.engine.decoder.tokenizer.chat_template is not None

    def start(self) -> None:
        """Let the engine run in its thread."""
        self.engine.start()

    async def stop(self) -> None:
        """Let what has begun come to its end, for as long as the options say, and stop the engine."""
        self.is_draining = True
        await self.jobs.drain(self.options.drain_seconds)
        await asyncio.to_thread(self.engine.stop)

    def is_alive(self) -> bool:
        """Whether the engine can do work."""
        return self.engine.is_running

    def memory_of(self, model: str, memory: str | None) -> str | None:
        """Return the store's name of the memory that a request reads, None for the model alone; may read the disk."""
        named = memory_named(model, memory, self.base, self.root)
        if named is None:
            return None
        if self.shelf is None:
            raise ApiError(
                404,
                f"the model {named!r:.200} does not exist; this server has no memories (memdlm serve --memories).",
                param="model" if memory is None else "memory",
                code="model_not_found",
            )
        return self.shelf.stored_name(named)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids; DataError for one that cannot be encoded, ApiError for one that is too long."""
        decoder = self.engine.decoder
        with self._encoding:
            try:
                ids = encode_prompts(decoder.tokenizer, [prompt], vocabulary_of(decoder.model))[0].tolist()
            except DataError as error:
                raise DataError(str(error).removeprefix("prompt 0: ")) from error
        if len(ids) > self.options.max_prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens; this server takes {self.options.max_prompt_tokens}. Shorten it.",
                code="context_length_exceeded",
            )
        return ids

    def config_of(self, asked: Asked) -> GenerationConfig:
        """Return how a request wants its answer decoded; ConfigError for what is not possible."""
        given: dict[str, Any] = asked.decoding()
        if asked.most_tokens is not None:
            if asked.most_tokens > self.options.max_tokens:
                raise ApiError(
                    400,
                    f"an answer may have {self.options.max_tokens} tokens here, {asked.most_tokens} were asked for.",
                    param="max_tokens",
                )
            given |= {"max_new_tokens": asked.most_tokens, "max_length": None}
        plain = {each.name: each.default for each in dataclasses.fields(GenerationConfig)}
        rivals = {rival: plain[rival] for name in given for rival in RIVALS.get(name, ()) if rival not in given}
        config = dataclasses.replace(self.defaults, **{**rivals, **given})
        config.refuse_idle(name for name in given if name not in ("max_new_tokens", "max_length"))
        return config

    async def submit(self, asked: Asked, prompts: Sequence[Prompt]) -> Choices:
        """Queue the answers that a request asks for; ApiError says why not."""
        count = (asked.n or 1) * len(prompts)
        if count > self.options.max_choices:
            raise ApiError(
                400, f"{count} answers are asked for; one request may ask for {self.options.max_choices}.", param="n"
            )
        end = time.monotonic() + self.options.request_seconds
        requests = await asyncio.to_thread(self._requests, asked, prompts)
        choices = Choices(
            tickets=[],
            model=asked.model,
            prompt_tokens=sum(len(each.prompt) for each in requests[:: asked.n or 1]),
            end=end,
        )
        try:
            for request in requests:
                choices.tickets.append(await self.queue(request))
        except BaseException:
            choices.cancel()
            raise
        for ticket in choices.tickets:
            self.metrics.watch(ticket)
        return choices

    def _requests(self, asked: Asked, prompts: Sequence[Prompt]) -> list[GenerationRequest]:
        try:
            memory, config = self.memory_of(asked.model, asked.memory), self.config_of(asked)
            seeds = list(_seeds(asked, config))
            steps = asked.stream_options is not None and asked.stream_options.include_steps
            return [
                GenerationRequest(prompt=ids, config=config, memory=memory, seed=seed, stop=asked.stops, steps=steps)
                for ids in map(self.encode, prompts)
                for seed in seeds
            ]
        except MemDLMError as error:
            raise refused(error) from error

    async def queue(self, request: GenerationRequest | WriteRequest) -> Ticket:
        """Hand a job to the engine, which may read files; ApiError with status 429 if its queue is full."""
        handed = asyncio.get_running_loop().run_in_executor(None, self._hand, request)
        try:
            return await asyncio.shield(handed)
        except asyncio.CancelledError:
            # The client has gone, and the thread goes on.
            handed.add_done_callback(_give_up)
            raise
        except EngineFullError as error:
            self.metrics.refused.inc()
            raise ApiError(429, f"{error}", code="queue_full", retry_after=self.metrics.wait_s()) from error
        except MemDLMError as error:
            raise refused(error) from error

    def _hand(self, request: GenerationRequest | WriteRequest) -> Ticket:
        return self.engine.submit(request) if isinstance(request, GenerationRequest) else self.engine.write(request)

    def check_writable(self) -> Shelf:
        """Return the shelf if clients may change it; ApiError otherwise."""
        if self.shelf is None:
            raise ApiError(404, "this server has no memories; its operator can name a folder: memdlm serve --memories.")
        if self.options.read_only:
            raise ApiError(403, "clients may not change this server's memories (read_only).")
        return self.shelf


def memory_named(model: str, memory: str | None, base: str, root: str) -> str | None:
    """Return the memory that a request names, None for the model alone; ApiError for two of them.

    `base` and `root` are the names of the model.
    """
    if model in (base, root):
        return memory
    prefix = next((each for each in (f"{base}:", f"{root}:") if model.startswith(each)), "")
    named = model.removeprefix(prefix)
    if memory is not None and memory != named:
        raise ApiError(
            400, f"model names the memory {named!r:.200}, memory {memory!r:.200}; leave one out.", param="memory"
        )
    return named


def _give_up(handed: "asyncio.Future[Ticket]") -> None:
    if not handed.cancelled() and handed.exception() is None:
        handed.result().cancel()


def _seeds(asked: Asked, config: GenerationConfig) -> list[int]:
    """Return a seed per answer. The first is the request's own, so that `seed` alone says what one answer is."""
    is_drawn = config.temperature != 0 or config.remasking == "random"
    seed = asked.seed if asked.seed is not None else secrets.randbits(48) if is_drawn else 0
    return [seed, *(number_of("memdlm serve", seed, place) for place in range(1, asked.n or 1))]
