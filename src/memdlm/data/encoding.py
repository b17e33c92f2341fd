"""Conversations -> rows of tokens, in parallel; and which of them a run of a given length can learn from."""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from memdlm.data.chat import ChatEncoder, Encoded
from memdlm.data.layouts import Columns, parse_column_map
from memdlm.data.turns import TRAIN_TURNS
from memdlm.errors import DataError
from memdlm.options import option, validate
from memdlm.templates import text_ids

TRUNCATIONS = ("filter", "right")
CHUNK = 256
"""Conversations that a worker encodes at a time."""
COLUMNS = ("input_ids", "labels", "prompt_length", "length")
CONTEXT = "context_ids"
"""Column of the tokens that only a memory sees, with `context_column`."""


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What of a conversation is learned."""

    mask_prompt_loss: bool = option(True, "Never mask, and never score, what is not an answer.")
    train_turns: str = option("last", "Which assistant turns are learned.", choices=TRAIN_TURNS)
    context_column: str | None = option(
        None, "Column with a text that is not shown: mem_write_source=context writes it, and the answers need it."
    )
    column_map: str | None = option(
        None, "The data's column names = ours: question=prompt,answer=response; NAME= leaves a column out."
    )

    def __post_init__(self) -> None:
        validate(self)
        parse_column_map(self.column_map)

    @property
    def columns(self) -> Columns:
        """How the data's columns are read."""
        return Columns(parse_column_map(self.column_map), self.context_column)

    @property
    def encoding(self) -> "EncodingOptions":
        """The part that preprocessed data depends on."""
        return EncodingOptions(**{each.name: getattr(self, each.name) for each in dataclasses.fields(EncodingOptions)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What became of the conversations of a split."""

    conversations: int
    kept: int
    too_long: int = 0
    """Left out, longer than `max_length` (truncation=filter)."""
    shortened: int = 0
    """Kept, but cut at their right end to `max_length` (truncation=right)."""
    without_target: int = 0
    """Left out: nothing to learn, or nothing within `max_length`."""


@final
class TokenRows(Sequence[dict[str, list[int]]]):
    """Rows with `input_ids` and `labels`, at most `max_length` tokens long, and perhaps `context_ids`; see `fit`."""

    def __init__(
        self,
        rows: Sequence[Any],
        places: Sequence[int],
        lengths: Sequence[int],
        max_length: int,
        *,
        has_context: bool = False,
    ) -> None:
        self.rows, self.places, self.max_length, self.has_context = rows, places, max_length, has_context
        self.lengths = [min(length, max_length) for length in lengths]
        """Tokens of every row, known without reading it."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Return one row."""
        row = self.rows[self.places[index]]
        cut = {name: row[name][: self.max_length] for name in ("input_ids", "labels")}
        return cut | ({CONTEXT: row[CONTEXT]} if self.has_context else {})


def fit(
    rows: Sequence[Any],
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    *,
    max_length: int,
    truncation: str,
    has_context: bool = False,
) -> tuple[TokenRows, Counts]:
    """Choose the rows to train on, and count.

    `filter` leaves out rows longer than `max_length` (the paper's choice); `right` keeps the first `max_length` tokens
    of them, that is, cuts their right end off. A row without a target left is dropped: rows whose prompt fills
    `max_length` would count and teach nothing. `lengths` and `prompt_lengths` are the rows' (in tokens). With
    `has_context` the chosen rows keep their context, whole: it is not part of their length.
    """
    places, too_long, shortened, empty = [], 0, 0, 0
    for place, (length, prompt) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        if length > max_length and truncation == "filter":
            too_long += 1
        elif prompt >= min(length, max_length):
            empty += 1
        else:
            shortened += length > max_length
            places.append(place)
    counts = Counts(
        conversations=len(lengths), kept=len(places), too_long=too_long, shortened=shortened, without_target=empty
    )
    chosen = [lengths[place] for place in places]
    return TokenRows(rows, places, chosen, max_length, has_context=has_context), counts


def encode_chunk(
    conversations: Sequence[dict[str, Any]], first: int, tokenizer: PreTrainedTokenizerBase, options: EncodingOptions
) -> list[dict[str, Any]]:
    """Encode rows first, first + 1, ... of a split: COLUMNS, and CONTEXT if wanted. Raises DataError naming the row.

    `prompt_length` is a row's length if nothing of it is learned.
    """
    encoder = ChatEncoder(tokenizer, train_turns=options.train_turns, mask_prompt_loss=options.mask_prompt_loss)
    rows = [_row(encoded) for encoded in encoder.encode_rows(conversations, first)]
    if options.context_column is not None:
        for index, (row, conversation) in enumerate(zip(rows, conversations, strict=True), start=first):
            try:
                row[CONTEXT] = _context(conversation, options.context_column, tokenizer)
            except DataError as error:
                raise DataError(f"row {index}: {error}") from error
    return rows


def _row(encoded: Encoded) -> dict[str, Any]:
    return {
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "prompt_length": encoded.prompt_length,
        "length": len(encoded.input_ids),
    }


def _context(conversation: dict[str, Any], column: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = conversation.get(column)
    if not isinstance(text, str) or not text.strip():
        others = ", ".join(name for name in conversation if name != "messages")
        raise DataError(
            f"context_column: {column!r} must be a column of text, got {text!r} (columns beside the conversation: "
            f"{others or 'none'})."
        )
    return text_ids(tokenizer, text)


def encode_all(
    conversations: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodingOptions,
    *,
    num_proc: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Encode a split in memory, in order; `advance` is told how many are done."""
    rows: list[dict[str, Any]] = []
    starts = range(0, len(conversations), CHUNK)
    for chunk in in_parallel(conversations, starts, CHUNK, tokenizer, options, num_proc):
        rows += chunk
        advance(len(rows))
    return rows


def in_parallel(
    conversations: Sequence[dict[str, Any]],
    starts: Sequence[int],
    size: int,
    tokenizer: PreTrainedTokenizerBase,
    options: EncodingOptions,
    num_proc: int,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the encoded chunks of `size` conversations that begin at `starts`, in that order."""
    if num_proc == 1 or len(starts) < 2:
        for start in starts:
            yield encode_chunk(conversations[start : start + size], start, tokenizer, options)
        return
    # Fresh processes: a copy of one that has run threads can hang.
    context = multiprocessing.get_context("spawn")
    workers = min(num_proc, len(starts))
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, options)) as pool:
        waiting: list[Future[list[dict[str, Any]]]] = []
        ahead = iter(starts)
        try:
            for start in ahead:
                waiting.append(pool.submit(_work, conversations[start : start + size], start))
                # A few chunks per worker, so that a large dataset is never held whole.
                if len(waiting) >= 3 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for each in waiting:
                each.cancel()


_worker: dict[str, Any] = {}
"""What a worker process was started with."""


def _start_worker(tokenizer: PreTrainedTokenizerBase, options: EncodingOptions) -> None:
    # Each worker has one core; threads of its own would fight for those of the others.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=tokenizer, options=options)


def _work(conversations: Sequence[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    return encode_chunk(conversations, first, _worker["tokenizer"], _worker["options"])
