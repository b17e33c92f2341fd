"""Conversations -> token ids and labels, through the model's own chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm.errors import DataError, MemDLMError, unknown
from memdlm.types import IGNORE_INDEX

ROLES = ("system", "user", "assistant", "tool")
TRAIN_TURNS = ("last", "all")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens."""

    input_ids: list[int]
    labels: list[int]
    """The id where a token is supervised, -100 elsewhere."""
    prompt_length: int
    """Tokens before the first supervised one."""


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    train_turns: str = "last",
    mask_prompt_loss: bool = True,
) -> Encoded:
    """Tokenize a conversation and supervise its last or all assistant turns: content and end-of-turn token.

    `mask_prompt_loss=False` supervises every token. What is supervised is found by templating prefixes of the
    conversation, and checked: a template whose prefixes are not token prefixes (one that strips reasoning from earlier
    turns, say) raises DataError, as do a conversation without assistant turn, a malformed message, and a tokenizer
    without chat template.
    """
    if train_turns not in TRAIN_TURNS:
        raise DataError(unknown("train_turns:", train_turns, TRAIN_TURNS))
    _check(messages, train_turns)
    ids = _template(tokenizer, messages, generation=False)
    labels = [IGNORE_INDEX] * len(ids)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index in turns[-1:] if train_turns == "last" else turns:
        start = len(_prefix(tokenizer, messages, index, ids, generation=True))
        end = len(_prefix(tokenizer, messages, index + 1, ids, generation=False))
        labels[start:end] = ids[start:end]
    if not mask_prompt_loss:
        labels = list(ids)
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    return Encoded(ids, labels, first)


def encode_records(
    records: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_turns: str = "last",
    mask_prompt_loss: bool = True,
) -> list[Encoded]:
    """Encode rows with `messages`; an error names the row."""
    encoded = []
    for index, record in enumerate(records):
        try:
            encoded.append(
                encode_chat(tokenizer, record["messages"], train_turns=train_turns, mask_prompt_loss=mask_prompt_loss)
            )
        except MemDLMError as error:
            raise DataError(f"row {index}: {error}") from error
    return encoded


def _check(messages: Sequence[Mapping[str, str]], train_turns: str) -> None:
    if not messages:
        raise DataError("the conversation has no messages.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"message {index} needs 'role' and 'content', got {message!r}.")
        if message["role"] not in ROLES:
            raise DataError(f"message {index}: {unknown('role', message['role'], ROLES)}")
        if not isinstance(message["content"], str):
            raise DataError(f"message {index}: the content must be text, got {message['content']!r}.")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(f"the conversation has no assistant turn to learn from (roles: {', '.join(roles)}).")
    if train_turns == "last" and roles[-1] != "assistant":
        raise DataError(f"the last message is from {roles[-1]!r}, not 'assistant'; end the conversation with a reply.")


def _prefix(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    count: int,
    whole: list[int],
    *,
    generation: bool,
) -> list[int]:
    ids = _template(tokenizer, messages[:count], generation=generation) if count else []
    if whole[: len(ids)] != ids:
        raise DataError(
            f"the chat template does not keep its prefixes: the first {count} messages are tokenized differently when "
            "more follow, so the supervised tokens of a turn cannot be told. Use train_turns='last' or another "
            "template."
        )
    return ids


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, generation: bool
) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template; set tokenizer.chat_template, or load an instruct model's.")
    return list(
        tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=generation, return_dict=False
        )
    )
