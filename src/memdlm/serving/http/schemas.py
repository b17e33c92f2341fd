"""What requests may say. A field that cannot take effect is refused by name, and so is one that is not known."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from memdlm.inference import GenerationConfig

DECODING = (
    *("block_size", "steps", "steps_per_block", "top_k", "remasking", "threshold", "factor", "minimal_topk"),
    *("num_to_transfer", "editing_threshold", "max_post_steps", "stable_steps", "cfg_scale", "suppress_tokens"),
    *("begin_suppress_tokens", "eos_early_stop"),
)
"""Options of decoding that a request may set beside OpenAI's own; the others are the operator's."""
UNABLE: Mapping[str, str] = {
    "logprobs": "a masked diffusion model has no probabilities of tokens from left to right",
    "top_logprobs": "a masked diffusion model has no probabilities of tokens from left to right",
    "presence_penalty": "penalties are not implemented",
    "frequency_penalty": "penalties are not implemented",
    "logit_bias": "biases are not implemented; suppress_tokens forbids tokens",
    "tools": "tools are not implemented",
    "tool_choice": "tools are not implemented",
    "functions": "tools are not implemented",
    "function_call": "tools are not implemented",
    "response_format": "only plain text is produced",
    "modalities": "only plain text is produced",
    "audio": "only plain text is produced",
    "prediction": "predictions are not implemented",
    "reasoning_effort": "there is no reasoning to adjust",
    "store": "nothing is stored",
    "metadata": "nothing is stored",
    "echo": "the prompt is not repeated",
    "best_of": "answers are not ranked; n gives several",
    "suffix": "filling in is not served; see memdlm infill",
}
"""OpenAI's fields that only their neutral values may have, and why."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
}
IGNORED = ("user", "safety_identifier", "parallel_tool_calls", "service_tier")
"""OpenAI's fields that never change an answer here; any value is taken."""
WHOLE = Field(ge=-(2**63), lt=2**63)
NAME = Annotated[str, Field(min_length=1, max_length=512)]
STOP = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """A body without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A part of a message; texts are all there is."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(Strict):
    """What a stream has beside the text."""

    include_usage: bool = False
    include_steps: bool = Field(False, description="Also send every denoising step, in a field `memdlm` of the chunks.")


class Asked(Strict):
    """What chats and completions share."""

    model: NAME
    memory: NAME | None = Field(None, description="Name of the memory that is read; `model` is then the base.")
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: float | None = Field(None, description="0: the likeliest tokens. Unset: the server's own.")
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    seed: Annotated[int, WHOLE] | None = None
    stop: STOP | Annotated[list[STOP], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator(*UNABLE, check_fields=False)
    @classmethod
    def _asks_for_nothing(cls, value: Any, info: ValidationInfo) -> None:
        name = str(info.field_name)
        # 0 is neutral for a penalty, but asks for log-probabilities of the chosen tokens.
        is_zero = name != "logprobs" and not isinstance(value, bool) and value == 0
        if value is None or value is False or is_zero or value in ("", [], {}) or value in NEUTRAL.get(name, ()):
            return
        raise PydanticCustomError("unsupported", "{why}; leave this field out", {"why": UNABLE[name]})

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def most_tokens(self) -> int | None:
        """How long an answer may become; None: not said."""
        return self.max_tokens

    def decoding(self) -> dict[str, Any]:
        """Return the options of decoding that the request sets, under our names."""
        names = ("temperature", "top_p", *DECODING)
        found = {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _extended(name: str, base: type[Asked], **more: Any) -> Any:
    """Return `base` with our options of decoding, and the fields that are refused or ignored."""
    hints = get_type_hints(GenerationConfig)
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(GenerationConfig)}
    fields = {
        each: (
            (list[int] if each.endswith("suppress_tokens") else hints[each]) | None,
            Field(None, description=helps[each]),
        )
        for each in DECODING
    }
    refused = {each: (Any, Field(None, description=f"Refused: {why}.")) for each, why in UNABLE.items()}
    ignored = {each: (Any, Field(None, description="Has no effect.")) for each in IGNORED}
    return create_model(name, __base__=base, __doc__=base.__doc__, **{**fields, **refused, **ignored, **more})


class _Chat(Asked):
    """A conversation to answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """How long an answer may become; None: not said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class _Completion(Asked):
    """Texts, or ids, to continue."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[int, WHOLE]], Field(min_length=1)]
        | Annotated[list[list[Annotated[int, WHOLE]]], Field(min_length=1, max_length=64)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [list(given)]
        return list(given)


ChatRequest = _extended("ChatRequest", _Chat)
CompletionRequest = _extended("CompletionRequest", _Completion)


class LoadAdapter(Strict):
    """What is loaded, and under which name."""

    lora_name: NAME
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Folder of a memory inside the folder that the server serves."
    )
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadAdapter(Strict):
    """What is unloaded."""

    lora_name: NAME
    lora_int_id: int | None = None


class NewMemory(Strict):
    """A text that becomes a memory."""

    name: NAME
    text: Annotated[str, Field(min_length=1)]
    as_message: bool = Field(False, description="Write it as a user's message in the chat template.")
    overwrite: bool = Field(False, description="Replace an earlier memory of this name.")
    seed: Annotated[int, WHOLE] = 0
