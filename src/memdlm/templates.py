"""Turn messages and texts into tokens. Only the chat template writes control tokens; what people write is text.

A text may spell a control token, say <|mask|> or <|endoftext|>. In a message, a document or a context the spelling is
plain text. A mark is put inside it before the message is rendered, so that the tokenizer does not find it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import jinja2
from transformers import PreTrainedTokenizerBase

from memdlm.errors import DataError

MARK = "\U0010fffd"
"""Goes behind the first character of a control token that is meant as text. A private-use character: texts lack it."""
NAMED = ("bos", "eos", "pad", "mask", "sep", "cls")

Message = Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Control:
    """The control tokens of a tokenizer: those it calls special, except the unknown token."""

    ids: Mapping[str, int]
    """Token id of each spelling."""
    pattern: re.Pattern[str]
    """Finds a spelling, and of several the longest."""

    def shield(self, value: Any) -> Any:
        """Return `value` (text, or lists and mappings of texts) with a mark in every control token that it spells.

        Raises DataError for a text that holds the mark already.
        """
        if isinstance(value, str):
            if MARK in value:
                raise DataError("a text holds the private character U+10FFFD, which memdlm needs as a mark. Remove it.")
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
    """Tokenize a text as plain text, even where it spells a control token.

    Raises DataError for half of a surrogate pair, and for a tokenizer that cannot write the spelling as text.
    """
    check_text(text)
    return _text_ids(tokenizer, text, control_of(tokenizer) if control is None else control)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Tokenize a text; a control token that it spells becomes that token. Raises DataError, see `check_text`."""
    check_text(text)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def message_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool = False
) -> list[int]:
    """Put messages through the chat template and tokenize them; their contents are plain text.

    `generation` appends what the template writes before an answer. Raises DataError, see `render` and `rendered_ids`.
    """
    control = control_of(tokenizer)
    return rendered_ids(tokenizer, render(tokenizer, control.shield(list(messages)), generation=generation), control)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool = False, tools: Any = None
) -> str:
    """Return what the chat template makes of shielded messages.

    Raises DataError when there is no template, when it refuses the messages, and for text that cannot be encoded.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template; set tokenizer.chat_template, or load an instruct model's. A base "
            "model continues text: memdlm generate without --chat, and training on rows with a text."
        )
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
    """Do what `render` does, for many conversations in one call, which is faster."""
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
    # One by one, to find the conversation that cannot be rendered.
    return [render(tokenizer, messages, generation=generation) for messages in conversations]


def rendered_ids(tokenizer: PreTrainedTokenizerBase, text: str, control: Control) -> list[int]:
    """Tokenize what `render` returned: marked spellings as text, all others as control tokens.

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
            "a message spells a control token, and this tokenizer cannot tell the spelling from the token: it cuts a "
            "text between control tokens differently than a text alone. Take the spelling out."
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
            f"{where}character {place} of the text is {text[place]!a}, half of a surrogate pair and not a "
            "character (a cut emoji, or bytes that are not UTF-8). Repair the text, or take it out."
        )


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str, control: Control) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    wrong = set(control.ids.values())
    if wrong.isdisjoint(ids):
        return ids
    # The vocabulary also has the spelling as an ordinary word, so the text is cut behind its first character.
    pieces = control.pattern.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", text).split(MARK)
    ids = [
        token
        for piece in pieces
        for token in tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    ]
    if not wrong.isdisjoint(ids):
        raise DataError("the text spells a control token that this tokenizer cannot write as text. Take it out.")
    return ids
