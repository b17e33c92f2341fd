"""What is asked of a serving engine, and what it answers: requests, events, results, figures."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from memdlm.inference.config import GenerationConfig
from memdlm.inference.decoder import Generation
from memdlm.memory.config import MemoryConfig
from memdlm.memory.files.saved import SavedMemory

MemoryId: TypeAlias = Hashable
"""The name under which an engine's store knows a memory; text in a folder of memories."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt to answer. The response is the one that the request would get alone."""

    prompt: Sequence[int]
    """Ids, already put through the chat template."""
    config: GenerationConfig = field(default_factory=GenerationConfig)
    memory: MemoryId | None = None
    """The memory that is read while decoding; None: none. Nothing is written."""
    seed: int = 0
    """Seed of all draws. With 0, the response is that of `generate` without a generator."""
    stop: tuple[str, ...] = ()
    """Texts before which the response ends."""
    steps: bool = False
    """Whether every denoising step is told, as a `Stepped`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteRequest:
    """One text to be written into a memory of its own, which the store keeps under a name."""

    ids: Sequence[int]
    """The text's tokens; a mask token in it is not learned."""
    memory: MemoryId
    """The name that the memory gets; a memory of that name is replaced when the write is done."""
    config: MemoryConfig | None = None
    """None: that of the model's folder (a learned start), or the paper's."""
    seed: int = 0
    """Seed of the write; the memory is the one that the text would get alone."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Noted in the memory (JSON)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The job has left the queue: a response has its place in the batch, or a write has begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """More of a response is final: these ids follow those of the events before, without a gap."""

    block: int
    """Which block of the response the step belonged to, from 0 on."""
    ids: tuple[int, ...]
    """The end token, if there is one, is the last; nothing is settled after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """What one denoising step changed in a response; nothing of it is final. For whoever watches."""

    block: int
    changes: tuple[tuple[int, int], ...]
    """Places in the response, from 0 on, and the ids that stand there now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a write has come, in gradients: every update takes one for each chunk of the text."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The job's result; the last event."""

    result: "Response | Memorized"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Why there is no result; the last event. CancelledError: the job was cancelled, or the engine was stopped."""

    error: Exception


Event: TypeAlias = Started | Settled | Stepped | Progress | Done | Failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """A finished response."""

    ids: tuple[int, ...]
    """Up to and with the first end token, if any. After a stop text: all that was settled until it was found."""
    text: str
    """Without special tokens, cut before the stop text."""
    finish: str
    """stop: an end token; text: one of the request's stop texts; length: all tokens that were asked for."""
    generation: Generation
    """What `generate` would return. `num_forward_passes` are the passes that this response took part in."""
    num_prompt_tokens: int
    seconds_waiting: float
    seconds_running: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Memorized:
    """A finished write."""

    memory: MemoryId
    saved: SavedMemory
    """What the store keeps."""
    together: int
    """Number of texts that were written in the same batch."""
    seconds_waiting: float
    seconds_running: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What an engine does at one moment, and what it has done since it was made."""

    running: int
    """Responses in the batch."""
    waiting: int
    """Jobs that have not begun."""
    writing: int
    """Texts in the write that is under way."""
    slots: int
    live_memories: int
    """Memories on the device."""
    memory_bytes: int
    """What they take there; never more than the engine's `memory_bytes`."""
    memory_bytes_limit: int
    stacked_bytes: int
    """What the copies of the memories that the batch of now reads take, beside `memory_bytes`."""
    prefix_entries: int
    prefix_bytes: int
    prefix_bytes_limit: int
    steps: int
    """Denoising steps of the batch."""
    passes: int
    """Calls of the network; a step makes several when its rows differ much in length."""
    positions: int
    """Token positions that went through the network, without padding."""
    tokens: int
    """Tokens of finished responses."""
    responses: int
    writes: int
    """Memories written."""
    failed: int
    cancelled: int
    memory_hits: int
    """Responses whose memory was on the device."""
    memory_misses: int
    memory_evictions: int
    prefix_reused: int
    """Positions of prompts that the prefix cache held."""
