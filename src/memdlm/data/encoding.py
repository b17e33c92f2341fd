"""Conversations -> rows of tokens, in parallel; and which of them a run of a given length can learn from."""

import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
from transformers import PreTrainedTokenizerBase

from memdlm.data.chat import ChatEncoder, Encoded
from memdlm.data.layouts import Columns, parse_column_map
from memdlm.data.turns import TRAIN_TURNS
from memdlm.errors import DataError, MachineError
from memdlm.options import option, validate

TRUNCATIONS = ("filter", "right")
CHUNK = 256
"""Conversations that a worker encodes at a time."""
COLUMNS = ("input_ids", "labels", "prompt_length", "length")
CONTEXT = "context_ids"
"""Column of the tokens that only a memory sees, with `context_column`."""
Packed: TypeAlias = dict[str, tuple[Any, list[int] | None]]
"""By column its numbers as one int32 array, and the lengths of the lists that they are, if they are lists."""


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What of a conversation is learned."""

    mask_prompt_loss: bool = option(True, "Mask and score only the answers, never the rest of a conversation.")
    train_turns: str = option("last", "Which assistant turns are learned.", choices=TRAIN_TURNS)
    context_column: str | None = option(
        None,
        "Column with a text that the network is not shown. mem_write_source=context writes it, and the "
        "answers need it.",
    )
    column_map: str | None = option(
        None,
        "Which of our columns each of the data's columns is: question=prompt,answer=response. NAME= leaves "
        "a column out.",
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
                row[CONTEXT] = encoder.text(_context(conversation, options.context_column))
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


def _context(conversation: dict[str, Any], column: str) -> str:
    text = conversation.get(column)
    if not isinstance(text, str) or not text.strip():
        others = ", ".join(name for name in conversation if name != "messages")
        raise DataError(
            f"context_column: {column!r} must be a column of text, got {text!r} (columns beside the conversation: "
            f"{others or 'none'})."
        )
    return text


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
    # Not copies of this process, which has run threads and could hang. Where there is a fork server, the libraries are
    # loaded once for all workers.
    is_unix = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if is_unix else "spawn")
    if is_unix:
        context.set_forkserver_preload([__name__])
    workers = min(num_proc, len(starts))
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, options)) as pool:
        waiting: list[Future[Packed]] = []
        ahead = iter(starts)
        try:
            for start in ahead:
                waiting.append(pool.submit(_work, conversations[start : start + size], start))
                # A few chunks per worker, so that a large dataset is never held whole.
                if len(waiting) >= 3 * workers:
                    yield unpacked(waiting.pop(0).result())
            while waiting:
                yield unpacked(waiting.pop(0).result())
        except BrokenProcessPool as error:
            raise MachineError(
                f"num_proc={num_proc}: a process that tokenizes was killed, perhaps for want of memory. Use fewer."
            ) from error
        finally:
            for each in waiting:
                each.cancel()


_worker: dict[str, Any] = {}
"""What a worker process was started with."""


def _start_worker(tokenizer: PreTrainedTokenizerBase, options: EncodingOptions) -> None:
    # Each worker has one core; threads of its own would fight for those of the others.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=tokenizer, options=options)


def _work(conversations: Sequence[dict[str, Any]], first: int) -> Packed:
    return packed(encode_chunk(conversations, first, _worker["tokenizer"], _worker["options"]))


def packed(rows: Sequence[Mapping[str, Any]]) -> Packed:
    """Return rows as arrays by column, which pass between processes without a step per token."""
    columns: Packed = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        lengths = [len(value) for value in values] if isinstance(values[0], list) else None
        flat = itertools.chain.from_iterable(values) if lengths is not None else values
        columns[name] = (np.fromiter(flat, np.int32), lengths)
    return columns


def unpacked(columns: Packed) -> list[dict[str, Any]]:
    """Return the rows that were packed."""
    lists = {}
    for name, (flat, lengths) in columns.items():
        values = flat.tolist()
        if lengths is not None:
            ends = list(itertools.accumulate(lengths))
            values = [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        lists[name] = values
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
