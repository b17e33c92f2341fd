"""Messages and texts as tokens: only what the chat template writes is control; what people write is text.

A text may spell a control token, say <|mask|> or <|endoftext|>. In a message, a document or a context it means the
words. A mark is put inside such a spelling before the message is rendered, so that the tokenizer does not find it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import jinja2
from transformers import PreTrainedTokenizerBase

from memdlm.errors import DataError

MARK = "\U0010fffd"
"""Stands behind the first character of a control token that is meant as text. No text has it: it is private use."""
NAMED = ("bos", "eos", "pad", "mask", "sep", "cls")

Message = Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Control:
    """The control tokens of a tokenizer: those it calls special, but for the unknown word."""

    ids: Mapping[str, int]
    """By spelling."""
    pattern: re.Pattern[str]
    """Finds a spelling, the longest first."""

    def shield(self, value: Any) -> Any:
        """Return `value` (text, or lists and mappings of texts) with a mark in all control tokens that it spells.

        Raises DataError for a text that has the mark itself.
        """
        if isinstance(value, str):
            if MARK in value:
                raise DataError("a text holds the private character U+10FFFD, which marks control tokens here.")
            return self.pattern.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", value)
        if isinstance(value, Mapping):
            return {name: each if name == "role" else self.shield(each) for name, each in value.items()}
        return [self.shield(each) for each in value] if isinstance(value, (list, tuple)) else value


def control_of(tokenizer: PreTrainedTokenizerBase) -> Control:
    """Read the control tokens off a tokenizer."""
    ids = {str(token): place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in NAMED:
        token = getattr(tokenizer, f"{name}_token", None)
        if token is not None:
            ids[str(token)] = int(getattr(tokenizer, f"{name}_token_id"))
    ids = {token: place for token, place in ids.items() if len(token) > 1 and token != tokenizer.unk_token}
    longest_first = sorted(ids, key=lambda token: (-len(token), token))
    return Control(ids, re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, control: Control | None = None) -> list[int]:
    """Tokenize a text as itself: where it spells a control token, it means the words.

    Raises DataError for half of a surrogate pair, and for a tokenizer that cannot write the words.
    """
    check_text(text)
    return _text_ids(tokenizer, text, control_of(tokenizer) if control is None else control)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Tokenize a text as it is: control tokens that it spells are tokens. Raises DataError, see `check_text`."""
    check_text(text)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def message_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool = False
) -> list[int]:
    """Put messages through the chat template and tokenize them, their contents as text.

    `generation` appends what stands before an answer. Raises DataError, see `render` and `rendered_ids`.
    """
    control = control_of(tokenizer)
    return rendered_ids(tokenizer, render(tokenizer, control.shield(list(messages)), generation=generation), control)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool = False, tools: Any = None
) -> str:
    """Return what the chat template makes of shielded messages.

    Raises DataError when there is no template, when it refuses the messages, and for text that is none.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template; set tokenizer.chat_template, or load an instruct model's.")
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=generation
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template cannot render the messages: {error}") from error
    if not is_text(text):
        for index, message in enumerate(messages):
            check_text(str(message.get("content")), f"message {index}: ")
        check_text(text)
    return text


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, generation: bool = False
) -> list[str]:
    """Do what `render` does to many conversations in one call, which is faster."""
    if not conversations:
        return []
    if tokenizer.chat_template is not None:
        try:
            texts: list[str] = tokenizer.apply_chat_template(
                [list(messages) for messages in conversations], tokenize=False, add_generation_prompt=generation
            )
        except (jinja2.TemplateError, TypeError):
            texts = []
        if texts and all(map(is_text, texts)):
            return texts
    # One by one, to see which it is that cannot be rendered.
    return [render(tokenizer, messages, generation=generation) for messages in conversations]


def rendered_ids(tokenizer: PreTrainedTokenizerBase, text: str, control: Control) -> list[int]:
    """Tokenize what `render` returned: marked spellings as text, all others as the tokens that they are.

    Raises DataError when a text between control tokens is tokenized differently by itself.
    """
    whole = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if MARK not in text:
        return whole
    ids: list[int] = []
    apart: list[int] = []
    for piece in re.split(f"({control.pattern.pattern})", text):
        if piece in control.ids:
            ids.append(control.ids[piece])
            apart.append(control.ids[piece])
        elif piece:
            marked = list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            apart += marked
            ids += _text_ids(tokenizer, piece.replace(MARK, ""), control) if MARK in piece else marked
    if apart != whole:
        raise DataError(
            "a message spells a control token, and this tokenizer cannot tell it from the token itself: it cuts texts "
            "between control tokens in another way than by themselves. Take the words out."
        )
    return ids


def is_text(text: str) -> bool:
    """Whether a string can be encoded: half of a surrogate pair cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(text: str, where: str = "") -> None:
    """Raise DataError for half of a surrogate pair (a cut emoji), naming its place in the text."""
    if not is_text(text):
        place = next(index for index, letter in enumerate(text) if "\ud800" <= letter <= "\udfff")
        raise DataError(
            f"{where}character {place} of the text is {text[place]!a}, half of a surrogate pair and no character "
            "(a cut emoji, or bytes that are no UTF-8). Repair the text, or take it out."
        )


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str, control: Control) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    wrong = set(control.ids.values())
    if wrong.isdisjoint(ids):
        return ids
    # The vocabulary has the spelling as a word as well, so it is cut behind its first character.
    pieces = control.pattern.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", text).split(MARK)
    ids = [
        token
        for piece in pieces
        for token in tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    ]
    if not wrong.isdisjoint(ids):
        raise DataError("the text spells a control token that this tokenizer cannot write as text. Take it out.")
    return ids
