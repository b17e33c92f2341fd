"""Check messages: their content, whether they are learned, and whether the chat template shows all of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memdlm.errors import DataError, unknown

ROLES = ("system", "user", "assistant", "tool")
TRAIN_TURNS = ("last", "all")
MARKS = ("weight", "train", "trainable", "loss", "loss_mask")
"""Keys of a message that say whether it is learned: 0 or false, 1 or true."""
SHOWN = (
    *("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "thought", "thoughts"),
    *("documents", "citations"),
)
"""Keys of a message that change what a model is shown, if its template knows them."""
UNSEEN = ("images", "image", "audio", "audios", "video", "videos", "files", "attachments", "refusal")
"""Keys of a message whose content is not text."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    message: dict[str, Any]
    """The message for the template; its content is text."""
    is_learned: bool
    is_refused: bool
    """Whether the message is marked as not learned."""


def is_empty(value: Any) -> bool:
    """Whether a column or key is empty: null, blank text, an empty list."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def read_turns(messages: Sequence[Mapping[str, Any]], train_turns: str) -> list[Turn]:
    """Check a conversation and decide for every message whether it is learned.

    Assistant turns with a mark (see MARKS) follow it; the others follow `train_turns`. Raises DataError, which names
    the message, for one that is malformed, has an unknown role, or has content that is not text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("the conversation has no messages.")
    read = [_message(message, index) for index, message in enumerate(messages)]
    roles = [message["role"] for message, _ in read]
    if "assistant" not in roles:
        raise DataError(f"the conversation has no assistant turn to learn from (roles: {', '.join(roles)}).")
    if train_turns == "last" and roles[-1] != "assistant":
        raise DataError(f"the last message is from {roles[-1]!r}, not 'assistant'; end the conversation with a reply.")
    turns = []
    for index, (message, mark) in enumerate(read):
        by_rule = train_turns == "all" or index + 1 == len(read)
        is_learned = message["role"] == "assistant" and (by_rule if mark is None else mark)
        turns.append(Turn(message, is_learned, mark is False))
    return turns


def check_rendered(
    turns: Sequence[Turn], tools: Any, whole: str, render: Callable[[Sequence[Mapping[str, Any]], Any], str]
) -> None:
    """Raise DataError for tools and keys of messages that the template ignores: the text is `whole` without them."""
    messages = [turn.message for turn in turns]
    if tools and render(messages, None) == whole:
        raise DataError(
            "the chat template does not render 'tools', so the model would not be shown them. Use a template that "
            "does, or leave the column out (--column_map tools=)."
        )
    for index, message in enumerate(messages):
        for key in SHOWN:
            if is_empty(message.get(key)) or (key == "tool_call_id" and _is_in_order(messages, index)):
                continue
            without = {name: value for name, value in message.items() if name != key}
            if render([*messages[:index], without, *messages[index + 1 :]], tools) == whole:
                raise DataError(
                    f"message {index} ({message['role']}) has {key!r}, which the chat template does not render, so it "
                    "would be lost. Use a template that does, or take it out of the data."
                )


def _message(message: Any, index: int) -> tuple[dict[str, Any], bool | None]:
    """Return a message in the form for the template, and its mark."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f"message {index} needs 'role' and 'content', got {message!r}.")
    read = {key: value for key, value in message.items() if key not in MARKS and value is not None}
    call = read.pop("function_call", None)
    if not is_empty(call) and is_empty(read.get("tool_calls")):
        read["tool_calls"] = [{"type": "function", "function": call}]
    elif not is_empty(call):
        raise DataError(f"message {index} has both 'tool_calls' and 'function_call'; keep one of them.")
    if "content" not in message and is_empty(read.get("tool_calls")):
        raise DataError(f"message {index} needs 'role' and 'content', got {message!r}.")
    read["role"] = "tool" if message["role"] == "function" else message["role"]
    if read["role"] not in ROLES:
        raise DataError(f"message {index}: {unknown('role', message['role'], ROLES)}")
    for key in UNSEEN:
        if not is_empty(read.get(key)):
            raise DataError(f"message {index} has {key!r}, which is no text and would be lost. Take such rows out.")
    read["content"] = _content(message.get("content"), index, is_call=not is_empty(read.get("tool_calls")))
    return read, _mark(message, index)


def _content(content: Any, index: int, *, is_call: bool) -> str:
    if content is None and is_call:
        return ""
    if isinstance(content, (list, tuple)):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            others = [key for key, value in part.items() if value is not None] if kind == "text" else []
            if kind != "text" or not isinstance(part.get("text"), str) or set(others) != {"type", "text"}:
                raise DataError(
                    f"message {index}: the content has a part {json.dumps(part, default=str)[:80]}; only parts of type "
                    "'text' with a 'text' can be read."
                )
            texts.append(part["text"])
        return "".join(texts)
    if not isinstance(content, str):
        raise DataError(f"message {index}: the content must be text, got {content!r}.")
    return content


def _mark(message: Mapping[str, Any], index: int) -> bool | None:
    """Return a message's mark: whether it is learned, or None without one."""
    said = {key: message[key] for key in MARKS if message.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"message {index}: {key}={value!r}; possible: 0 or false (not learned), 1 or true (learned). Other "
                "weights are not supported."
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise DataError(f"message {index}: {', '.join(f'{key}={value!r}' for key, value in said.items())} disagree.")
    mark = next((bool(value) for value in said.values()), None)
    if mark and message["role"] != "assistant":
        key = next(iter(said))
        raise DataError(
            f"message {index} ({message['role']}): {key}={said[key]!r}, but only turns of the assistant are learned. "
            "Set it to 0, or use mask_prompt_loss=False to learn every token."
        )
    return mark


def _is_in_order(messages: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Whether the result at `index` answers the call of the same position, so that its id adds nothing."""
    start = index
    while start and messages[start - 1]["role"] == "tool":
        start -= 1
    calls = messages[start - 1].get("tool_calls") if start else None
    place = index - start
    if messages[index]["role"] != "tool" or not isinstance(calls, (list, tuple)) or place >= len(calls):
        return False
    call = calls[place]
    named = call.get("id") if isinstance(call, Mapping) else None
    return named == messages[index].get("tool_call_id") or (named is None and len(calls) == 1)
