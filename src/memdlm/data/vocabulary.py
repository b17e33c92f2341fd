"""Which words of a text a tokenizer does not have: it loses them, or spells them byte by byte."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from memdlm.templates import is_text
from memdlm.terminal import one_line

MANY = 0.01
"""From this share of a text's letters on, a warning is due. Vocabularies of published models stay far below it."""
LOOKED_AT = 256
"""Conversations of a split that are looked at; a whole dataset would take as long as tokenizing it."""
SHOWN, LONGEST = 5, 20
"""Examples in a warning, and letters of each."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class UnknownWords:
    """The words that a tokenizer does not have. Words are what white space separates."""

    share: float
    """Share of the text's letters that these words' missing parts take, 0 to 1."""
    words: tuple[str, ...]
    """Different words, in order of appearance."""
    lost: bool
    """Whether some of them became the unknown token; else all are spelled byte by byte."""

    @property
    def are_many(self) -> bool:
        """Whether a warning is due."""
        return self.share >= MANY

    def line(self, what: str) -> str:
        """Return a warning of one line about the text `what`."""
        shown = [_cut(one_line(word)) for word in self.words[:SHOWN]]
        more = f" and {len(self.words) - SHOWN:,} more" if len(self.words) > SHOWN else ""
        told = (
            "They all become the same unknown token, so nothing can tell them apart. Use a model that has them, or "
            "write them with words that it has."
            if self.lost
            else "They are spelled byte by byte. The text is kept, but a model that was not trained on spelled words "
            "does not understand them."
        )
        return (
            f"warning: {what}: {100 * self.share:.0f} % of the letters are in words that the tokenizer does not have "
            f"({', '.join(shown)}{more}). {told}"
        )


def unknown_words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> UnknownWords:
    """Find the words of `texts` that the tokenizer does not have.

    Control tokens that they spell are known. Texts that cannot be encoded are left out: their encoding raises its own
    error.
    """
    lost = tokenizer.unk_token_id
    spelled = set(byte_ids(tokenizer))
    counts = Counter(word for text in texts if is_text(text) for word in text.split())
    if not counts or (lost is None and not spelled):
        return UnknownWords(share=0.0, words=(), lost=False)
    words = list(counts)
    encoded = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    odd = spelled | {lost}
    missing: dict[str, float] = {}
    for word, ids in zip(words, encoded, strict=True):
        share = sum(token in odd for token in ids) / max(1, len(ids))
        if share > 0:
            missing[word] = share * len(word) * counts[word]
    total = sum(len(word) * count for word, count in counts.items())
    return UnknownWords(
        share=sum(missing.values()) / total,
        words=tuple(missing),
        lost=any(lost in ids for word, ids in zip(words, encoded, strict=True) if word in missing),
    )


def unknown_in_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Mapping[str, Any]], context: str | None = None
) -> UnknownWords:
    """Find the unknown words in the messages, and in the text column `context`, of up to LOOKED_AT conversations.

    They are drawn at random. What is not text is left out: its encoding raises its own error.
    """
    texts: list[Any] = []
    for place in looked_at(len(conversations)):
        row = conversations[place]
        messages = row.get("messages")
        for message in messages if isinstance(messages, list) else ():
            texts.append(message.get("content") if isinstance(message, Mapping) else None)
        texts.append(None if context is None else row.get(context))
    return unknown_words(tokenizer, [text for text in texts if isinstance(text, str)])


def looked_at(count: int) -> list[int]:
    """Return which of `count` conversations are looked at for unknown words, ascending; always the same ones."""
    return sorted(random.Random(count).sample(range(count), min(count, LOOKED_AT)))


def byte_ids(tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """Return the ids of the tokens that stand for one byte each, <0x00> to <0xFF>; none if it spells otherwise."""
    found = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return [token for token in found if token is not None and token != tokenizer.unk_token_id]


def _cut(word: str) -> str:
    return word if len(word) <= LONGEST else f"{word[:LONGEST]}..."
