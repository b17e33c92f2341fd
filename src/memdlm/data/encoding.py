"""Encode conversations into rows of tokens, in parallel, and choose the rows that fit a run's length."""

import dataclasses
import importlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""Number of conversations that a worker encodes at a time."""
LOOKED_AT = 4096
"""Number of rows whose contexts are looked at together."""
COLUMNS = ("input_ids", "labels", "prompt_length", "length")
CONTEXT = "context_ids"
"""Column of the tokens that only a memory sees, with `context_column`."""
Packed: TypeAlias = dict[str, tuple[Any, list[int] | None]]
"""By column: its numbers as one int32 array; if they form lists, the lengths of the lists, else None."""


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """Which parts of a conversation are learned."""

    mask_prompt_loss: bool = option(True, "Mask and score only the answers, never the rest of a conversation.")
    train_turns: str = option("last", "Which assistant turns are learned.", choices=TRAIN_TURNS)
    context_column: str | None = option(
        None,
        "Column with a text that the network is not shown. mem_write_source=context writes it, and the "
        "answers need it. Rows without such a text are trained without memory.",
    )
    column_map: str | None = option(
        None,
        "How the data's column names map to ours, as in question=prompt,answer=response; NAME= leaves a column out.",
    )

    def __post_init__(self) -> None:
        validate(self)
        parse_column_map(self.column_map)

    @property
    def columns(self) -> Columns:
        """Return how the data's columns are read."""
        return Columns(parse_column_map(self.column_map), self.context_column)

    @property
    def encoding(self) -> "EncodingOptions":
        """Return the options that preprocessed data depends on."""
        return EncodingOptions(**{each.name: getattr(self, each.name) for each in dataclasses.fields(EncodingOptions)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How many conversations of a split were kept, cut and left out."""

    conversations: int
    kept: int
    too_long: int = 0
    """Left out, longer than `max_length` (truncation=filter)."""
    shortened: int = 0
    """Kept, but cut at their right end to `max_length` (truncation=right)."""
    without_target: int = 0
    """Left out: nothing to learn, or nothing within `max_length`."""
    without_context: int = 0
    """Kept, but with nothing for a memory (`context_column`)."""

    def words(self) -> str:
        """Return the counts in words, without those that are 0."""
        words = [f"{self.kept} of {self.conversations} conversations are used"]
        for number, what in (
            (self.too_long, "too long"),
            (self.shortened, "cut at their end"),
            (self.without_target, "with nothing to learn"),
            (self.without_context, "without a context, for which no memory is written"),
        ):
            if number:
                words.append(f"{number} {what}")
        return ", ".join(words)


@final
class TokenRows(Sequence[dict[str, list[int]]]):
    """Rows with `input_ids` and `labels`, at most `max_length` tokens long, with optional `context_ids`; see `fit`."""

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
        """Number of tokens of every row, known without reading the row."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Return one row."""
        row = self.rows[self.places[index]]
        cut = {name: row[name][: self.max_length] for name in ("input_ids", "labels")}
        return cut | ({CONTEXT: row.get(CONTEXT) or []} if self.has_context else {})


def fit(
    rows: Sequence[Any],
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    *,
    max_length: int,
    truncation: str,
    context_lengths: Sequence[int] | None = None,
) -> tuple[TokenRows, Counts]:
    """Choose the rows to train on, and count them.

    `filter` leaves out rows longer than `max_length` (the paper's choice); `right` keeps their first `max_length`
    tokens. Rows without a target left are dropped: a row whose prompt fills `max_length` would teach nothing.
    `lengths` and `prompt_lengths` are in tokens. With `context_lengths` the chosen rows keep their whole context, which
    is not part of their length.
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
        conversations=len(lengths),
        kept=len(places),
        too_long=too_long,
        shortened=shortened,
        without_target=empty,
        without_context=0 if context_lengths is None else sum(context_lengths[place] == 0 for place in places),
    )
    chosen = [lengths[place] for place in places]
    return TokenRows(rows, places, chosen, max_length, has_context=context_lengths is not None), counts


def context_lengths(rows: Any) -> list[int]:
    """Return the tokens of every row's context; `rows` are a list of dictionaries, or a `datasets.Dataset`."""
    if isinstance(rows, list):
        return [len(row[CONTEXT]) for row in rows]
    if CONTEXT not in rows.column_names:
        return [0] * len(rows)
    compute = importlib.import_module("pyarrow.compute")
    parts = rows.select_columns([CONTEXT]).with_format("arrow").iter(LOOKED_AT)
    # A folder without contexts, joined with one that has them, has nulls.
    return [length or 0 for part in parts for length in compute.list_value_length(part[CONTEXT]).to_pylist()]


def encode_chunk(
    conversations: Sequence[dict[str, Any]], first: int, tokenizer: PreTrainedTokenizerBase, options: EncodingOptions
) -> list[dict[str, Any]]:
    """Encode rows first, first + 1, ... of a split, with COLUMNS and, if wanted, CONTEXT.

    `prompt_length` is the row's length if nothing of it is learned. Raises DataError, which names the row.
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
    """Return the text for the memory; nothing where there is none."""
    text = conversation.get(column)
    if text is None or (isinstance(text, str) and not text.strip()):
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"context_column: {column!r} must be a column of text, got {text!r} (columns beside the conversation: "
            f"{_beside(conversation)}). Name another one, or leave the row's empty."
        )
    return text


def check_contexts(splits: Sequence[Sequence[dict[str, Any]]], column: str | None, where: str) -> None:
    """Raise DataError if no row of the `splits` of `where` has anything in `column`; None: there need be nothing."""
    if column is None:
        return
    others: dict[str, None] = {}
    for conversations in splits:
        for start in range(0, len(conversations), CHUNK):
            for row in conversations[start : start + CHUNK]:
                text = row.get(column)
                if text is not None and (not isinstance(text, str) or text.strip()):
                    return
                others |= dict.fromkeys(row)
    others.pop(column, None)
    raise DataError(
        f"context_column: no row of {where} has a text in {column!r} (columns beside the conversation: "
        f"{_beside(others)}). Name another one, or leave context_column out."
    )


def _beside(row: Iterable[str]) -> str:
    return ", ".join(name for name in row if name not in ("messages", "text")) or "none"


def encode_all(
    conversations: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodingOptions,
    *,
    num_proc: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Encode a split in memory, in order; `advance` is called with the number of rows done."""
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
    # No forks of this process: it has run threads, so that a fork could hang. A fork server, where there is one, loads
    # the libraries once for all workers.
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
                # Only a few chunks per worker wait at a time, so that a large dataset is never held in memory.
                if len(waiting) >= 3 * workers:
                    yield unpacked(waiting.pop(0).result())
            while waiting:
                yield unpacked(waiting.pop(0).result())
        except BrokenProcessPool as error:
            raise MachineError(
                f"num_proc={num_proc}: a process that tokenizes was killed, perhaps because memory ran out. Use fewer."
            ) from error
        finally:
            for each in waiting:
                each.cancel()


_worker: dict[str, Any] = {}
"""The arguments that a worker process was started with."""


def _start_worker(tokenizer: PreTrainedTokenizerBase, options: EncodingOptions) -> None:
    # Workers use one core each; more threads would compete for the cores of other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=tokenizer, options=options)


def _work(conversations: Sequence[dict[str, Any]], first: int) -> Packed:
    return packed(encode_chunk(conversations, first, _worker["tokenizer"], _worker["options"]))


def packed(rows: Sequence[Mapping[str, Any]]) -> Packed:
    """Return rows as arrays by column, which pass between processes without work per token."""
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
