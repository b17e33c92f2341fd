"""Turn conversations into token ids and labels, with the model's own chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from memdlm.data.turns import TRAIN_TURNS, Turn, check_rendered, read_turns
from memdlm.errors import DataError, MemDLMError, unknown
from memdlm.templates import MARK, control_of, render, render_all, rendered_ids, text_ids
from memdlm.types import IGNORE_INDEX

WINDOW = 256
"""Number of characters before a boundary that are searched first for the last control token."""
SHORT = 64
"""Longest template text, in characters, that is tokenized once for all conversations."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens."""

    input_ids: list[int]
    labels: list[int]
    """Per token, its id if it is supervised, else -100."""
    prompt_length: int
    """Number of tokens before the first supervised one; all if nothing is supervised."""


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    train_turns: str = "last",
    mask_prompt_loss: bool = True,
    tools: Any = None,
) -> Encoded:
    """Tokenize a conversation and supervise its last or all assistant turns: content and end-of-turn token.

    A turn with its own `weight` or `train` follows that. `mask_prompt_loss=False` supervises every token except those
    of turns that are marked as not learned. Message contents are text: a control token spelled out there does not
    become that token. `tools` are rendered by the template. Supervised tokens are found by applying the template to
    prefixes of the conversation. Raises DataError for a template whose prefixes are not token prefixes (for example,
    one that strips reasoning from earlier turns), a conversation without assistant turn, a malformed message, a column
    that the template does not render, and a tokenizer without chat template.
    """
    encoder = ChatEncoder(tokenizer, train_turns=train_turns, mask_prompt_loss=mask_prompt_loss)
    return encoder.encode([{"messages": messages, "tools": tools}])[0]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text, and the parts of it that are learned."""

    text: str
    spans: tuple[tuple[str, str], ...]
    """Per learned turn: the text up to the start of its content, and the text up to its end."""
    left_out: tuple[tuple[str, str], ...]
    """The same for turns that are not learned even if everything else is."""


@dataclass(slots=True)
class _Draft:
    """A conversation that is being rendered."""

    turns: Sequence[Turn]
    shown: list[dict[str, Any]]
    """The messages, with control tokens in their contents shielded."""
    tools: Any
    whole: str | None = None
    last_head: str | None = None
    """The text before the content of the last message, if that message answers a question."""

    def is_question(self, index: int) -> bool:
        """Whether the message before `index` is one that is answered."""
        return index > 0 and self.shown[index - 1]["role"] != "assistant"


@final
class ChatEncoder:
    """One tokenizer and its chat template, for any number of conversations."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, train_turns: str = "last", mask_prompt_loss: bool = True
    ) -> None:
        if train_turns not in TRAIN_TURNS:
            raise DataError(unknown("train_turns:", train_turns, TRAIN_TURNS))
        self.tokenizer, self.train_turns, self.mask_prompt_loss = tokenizer, train_turns, mask_prompt_loss
        self._control = control_of(tokenizer)
        self._tails: dict[str, list[int]] = {}
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        # Tokens that depend on the text to their left would change after a cut.
        self._can_cut = tokenizer.is_fast and not any(token.lstrip or token.single_word for token in special)

    def encode_rows(self, rows: Sequence[Mapping[str, Any]], first: int = 0) -> list[Encoded]:
        """Encode rows, numbered from `first`. Raises DataError, which names the row."""
        try:
            return self.encode(rows)
        except MemDLMError:
            # Rows are encoded one by one only to find the one that failed.
            for index, row in enumerate(rows, start=first):
                try:
                    self.encode([row])
                except MemDLMError as error:
                    raise DataError(f"row {index}: {error}") from error
            raise

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Encoded]:
        """Encode rows with `messages` and optional `tools`, or with a `text` of which every token is learned."""
        found: list[Encoded | None] = [None] * len(rows)
        waiting: list[tuple[int, _Rendered, list[int]]] = []
        drafts = {place: self._draft(row) for place, row in enumerate(rows) if "messages" in row}
        # Most conversations need two texts, which are rendered together.
        plain = [draft for draft in drafts.values() if not draft.tools]
        for draft, text in zip(plain, render_all(self.tokenizer, [draft.shown for draft in plain]), strict=True):
            draft.whole = text
        asking = [draft for draft in plain if draft.turns[-1].is_learned and draft.is_question(len(draft.shown) - 1)]
        heads = render_all(self.tokenizer, [draft.shown[:-1] for draft in asking], generation=True)
        for draft, text in zip(asking, heads, strict=True):
            draft.last_head = text
        for place, row in enumerate(rows):
            if place not in drafts:
                found[place] = self._document(row["text"])
                continue
            rendered = self._render(drafts[place])
            cuts = self._cuts(rendered)
            if cuts is None:
                found[place] = self._by_prefixes(rendered)
            else:
                waiting.append((place, rendered, cuts))
        for (place, _, _), encoded in zip(waiting, self._by_pieces([each[1:] for each in waiting]), strict=True):
            found[place] = encoded
        return [each for each in found if each is not None]

    def text(self, text: str) -> list[int]:
        """Tokenize a text as itself, see `memdlm.templates.text_ids`."""
        return text_ids(self.tokenizer, text, self._control)

    def _document(self, text: str) -> Encoded:
        ids = [*self.text(text), int(self.tokenizer.eos_token_id)]
        return Encoded(ids, list(ids), 0)

    def _draft(self, row: Mapping[str, Any]) -> _Draft:
        turns = read_turns(row["messages"], self.train_turns)
        tools = row.get("tools")
        return _Draft(
            turns,
            [self._control.shield(turn.message) for turn in turns],
            self._control.shield(tools) if tools else None,
        )

    def _render(self, draft: _Draft) -> _Rendered:
        turns, shielded, tools = draft.turns, draft.shown, draft.tools
        whole = render(self.tokenizer, shielded, tools=tools) if draft.whole is None else draft.whole
        check_rendered(turns, tools, whole, lambda *changed: render(self.tokenizer, changed[0], tools=changed[1]))

        def span(index: int) -> tuple[str, str]:
            if index + 1 < len(shielded):
                return self._before(draft, index), render(self.tokenizer, shielded[: index + 1], tools=tools)
            return self._before(draft, index) if draft.last_head is None else draft.last_head, whole

        spans = tuple(span(index) for index, turn in enumerate(turns) if turn.is_learned)
        left_out = () if self.mask_prompt_loss else tuple(span(i) for i, turn in enumerate(turns) if turn.is_refused)
        return _Rendered(whole, spans, left_out)

    def _before(self, draft: _Draft, index: int) -> str:
        """Return the text before the content of assistant turn `index`."""
        messages, tools = draft.shown, draft.tools
        if draft.is_question(index):
            return render(self.tokenizer, messages[:index], generation=True, tools=tools)
        # Templates only open an answer after a question; otherwise the header is the common prefix of two answers.
        texts = [
            render(self.tokenizer, [*messages[:index], {"role": "assistant", "content": probe}], tools=tools)
            for probe in ("a", "b")
        ]
        return texts[0][: next((place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), None)]

    def _cuts(self, rendered: _Rendered) -> list[int] | None:
        """Return the place of the last control token before each boundary; None if prefixes must be tokenized instead.

        A fast tokenizer first finds control tokens, then tokenizes the pieces between them. A text can therefore be cut
        before a control token.
        """
        if not self._can_cut or MARK in rendered.text:
            return None
        cuts = []
        for prefix in (each for span in (*rendered.spans, *rendered.left_out) for each in span):
            if prefix in ("", rendered.text):
                cuts.append(-1)
                continue
            place = self._last_control(prefix)
            if place is None or not rendered.text.startswith(prefix):
                return None
            cuts.append(place)
        return cuts

    def _last_control(self, text: str) -> int | None:
        start = max(0, len(text) - WINDOW)
        for begin in (start, 0) if start else (0,):
            found = [each.start() for each in self._control.pattern.finditer(text, begin)]
            if found:
                return found[-1]
        return None

    def _by_pieces(self, waiting: Sequence[tuple[_Rendered, list[int]]]) -> list[Encoded]:
        """Tokenize each text once, cut before control tokens, all in one call."""
        pieces: list[str] = []
        starts: list[list[int]] = []
        for rendered, cuts in waiting:
            places = sorted({0, *(cut for cut in cuts if cut >= 0)})
            starts.append(places)
            ends = [*places[1:], len(rendered.text)]
            pieces += [rendered.text[start:end] for start, end in zip(places, ends, strict=True)]
        tokens = iter(self._batch(pieces))
        encoded = []
        for (rendered, cuts), places in zip(waiting, starts, strict=True):
            parts = [next(tokens) for _ in places]
            encoded.append(self._joined(rendered, cuts, dict(zip(places, parts, strict=True))))
        return encoded

    def _joined(self, rendered: _Rendered, cuts: Sequence[int], parts: Mapping[int, list[int]]) -> Encoded:
        ids: list[int] = []
        begins = {}
        for place, part in parts.items():
            begins[place] = len(ids)
            ids += part
        bounds = []
        prefixes = [each for span in (*rendered.spans, *rendered.left_out) for each in span]
        for prefix, cut in zip(prefixes, cuts, strict=True):
            if cut < 0:
                bounds.append(len(ids) if prefix else 0)
                continue
            tail = self._tail(prefix[cut:])
            if parts[cut][: len(tail)] != tail:
                raise DataError(_NO_PREFIX)
            bounds.append(begins[cut] + len(tail))
        return self._labelled(ids, bounds, len(rendered.spans))

    def _by_prefixes(self, rendered: _Rendered) -> Encoded:
        """Tokenize every prefix separately; works for any tokenizer, and if a content spells a control token."""
        ids = rendered_ids(self.tokenizer, rendered.text, self._control)
        bounds = []
        for prefix in (each for span in (*rendered.spans, *rendered.left_out) for each in span):
            part = ids if prefix == rendered.text else rendered_ids(self.tokenizer, prefix, self._control)
            if ids[: len(part)] != part:
                raise DataError(_NO_PREFIX)
            bounds.append(len(part))
        return self._labelled(ids, bounds, len(rendered.spans))

    def _labelled(self, ids: list[int], bounds: Sequence[int], learned: int) -> Encoded:
        spans = list(zip(bounds[::2], bounds[1::2], strict=True))
        labels = [IGNORE_INDEX] * len(ids) if self.mask_prompt_loss else list(ids)
        for start, end in spans[:learned]:
            labels[start:end] = ids[start:end]
        for start, end in spans[learned:]:
            labels[start:end] = [IGNORE_INDEX] * (end - start)
        if self.mask_prompt_loss:
            first = min((start for start, end in spans[:learned] if start < end), default=len(ids))
        else:
            first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
        return Encoded(ids, labels, first)

    def _tail(self, text: str) -> list[int]:
        if text in self._tails:
            return self._tails[text]
        ids = self._batch([text])[0]
        if len(text) <= SHORT:
            self._tails[text] = ids
        return ids

    def _batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The tokenizers library gives the same ids faster, without offsets.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


_NO_PREFIX = (
    "the chat template does not keep its prefixes: the messages before a turn are tokenized differently when more "
    "follow, so the supervised tokens of a turn cannot be found. Use train_turns='last' or another template."
)
