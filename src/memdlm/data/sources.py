"""Load the conversations of dataset specs by split: find rows, split, cut and mix them."""

import bisect
import hashlib
import importlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final, overload

from memdlm.data.layouts import Columns, check_mapped, read_row, to_conversation
from memdlm.data.records import SUFFIXES, read_directory, read_file, suffix_of
from memdlm.data.specs import DatasetSpec, parse_specs
from memdlm.errors import DataError
from memdlm.hub import look_for

HELD_OUT, SPLIT_SEED = 0.05, 42
"""Share of a hub dataset without a test split that becomes its test split, and the seed of the draw (published)."""
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")
"""Splits to evaluate on, in order of preference; a test split is only used if there is no other."""
LOOKED_AT = 100
"""Number of rows that are read to find the used columns of a dataset."""
SAVED = ("dataset_dict.json", "state.json")
"""Files that distinguish a folder written by `datasets` from a copy of a hub repository."""

Splits = dict[str, Any]
"""Rows by split: a list or a `datasets.Dataset`."""


@dataclass(frozen=True, slots=True)
class HubDataset:
    """How a hub dataset is loaded."""

    configurations: tuple[str | None, ...] = (None,)
    """Configurations that are loaded and joined when the spec names none."""
    renamed: Mapping[str, str] | None = None
    """Split name -> our name, for the splits that are used; None: all, under their own names."""
    is_split: bool = False
    """Whether 5 % of a single split become the test split."""


ALPACA = HubDataset(is_split=True)
KNOWN = {
    "tatsu-lab/alpaca": ALPACA,
    "Yukang/LongAlpaca-12k": ALPACA,
    "allenai/tulu-3-sft-mixture": HubDataset(is_split=True),
    "HuggingFaceTB/smoltalk": HubDataset(configurations=("all",)),
    "HuggingFaceH4/ultrachat_200k": HubDataset(renamed={"train_sft": "train", "test_sft": "test"}),
    "OpenCoder-LLM/opc-sft-stage1": HubDataset(
        configurations=("filtered_infinity_instruct", "largescale_diverse_instruct", "realuser_instruct"),
        is_split=True,
    ),
    "OpenCoder-LLM/opc-sft-stage2": HubDataset(
        configurations=("educational_instruct", "evol_instruct", "mceval_instruct", "package_instruct"),
        is_split=True,
    ),
}
"""By exact hub id; a local copy is recognised by its last two folders."""


@final
class Conversations(Sequence[dict[str, Any]]):
    """Rows of several datasets in sequence, turned into conversations when they are read."""

    def __init__(self, parts: Sequence[tuple[str, Sequence[Any]]], columns: Columns | None = None) -> None:
        self.parts, self.columns = list(parts), Columns() if columns is None else columns
        self._ends: list[int] = []
        for _, rows in self.parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(rows))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return one conversation, or a list. Raises DataError, which names dataset and row, for a bad row."""
        if isinstance(index, slice):
            return self._between(*index.indices(len(self)))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._between(place, place + 1, 1)[0]

    def _between(self, start: int, stop: int, step: int) -> list[dict[str, Any]]:
        if step != 1:
            return [self[place] for place in range(start, stop, step)]
        found: list[dict[str, Any]] = []
        part = bisect.bisect_right(self._ends, start)
        while start < stop:
            name, rows = self.parts[part]
            first = start - (self._ends[part - 1] if part else 0)
            last = min(first + stop - start, len(rows))
            for row, raw in enumerate(_rows_between(rows, first, last), start=first):
                found.append(to_conversation(raw, f"{name}, row {row}", self.columns))
            start, part = start + last - first, part + 1
        return found

    def unused_columns(self) -> dict[str, list[str]]:
        """Return, by dataset, the columns that are not used. Raises DataError as reading rows does."""
        unused: dict[str, list[str]] = {}
        for name, rows in self.parts:
            used: set[str] = set()
            for row, raw in enumerate(_rows_between(rows, 0, min(len(rows), LOOKED_AT))):
                used |= read_row(raw, f"{name}, row {row}", self.columns)[1]
            ours = {self.columns.renamed.get(column, column): column for column in sorted(columns_of(rows))}
            left = [column for name_of_ours, column in ours.items() if name_of_ours and name_of_ours not in used]
            if left:
                unused[name] = sorted({*unused.get(name, []), *left})
        return unused


def unused(splits: Iterable[Conversations]) -> list[str]:
    """Return one line per dataset with unused columns, which lists them."""
    found: dict[str, dict[str, None]] = {}
    for conversations in splits:
        for name, columns in conversations.unused_columns().items():
            found.setdefault(name, {}).update(dict.fromkeys(columns))
    return [f"{name}: columns that are not used: {', '.join(columns)}" for name, columns in found.items()]


def columns_of(rows: Sequence[Any]) -> set[str]:
    """Return the columns that any row has."""
    if isinstance(rows, list):
        return set().union(*(row for row in rows if isinstance(row, Mapping)))
    return set(rows.column_names)  # type: ignore[attr-defined]


def evaluation_split(splits: Collection[str]) -> str | None:
    """Return the name of the split to evaluate on, or None."""
    return next((name for name in EVALUATION_SPLITS if name in splits), None)


def _rows_between(rows: Sequence[Any], start: int, stop: int) -> Sequence[Any]:
    found: Any = rows[start:stop]
    if isinstance(found, Mapping):  # a `datasets.Dataset` gives columns
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    return list(found)


def load_conversations(dataset_args: str, columns: Columns | None = None) -> dict[str, Conversations]:
    """Return the conversations of a mixture by split, `train` first, datasets in the order of `dataset_args`.

    Limits: in a dataset with several splits, each named split keeps its first rows and the others are kept whole. A
    single split is cut into the named splits, which never overlap: `train` gets the first rows, the others the last.
    `columns` maps the data's column names. Raises DataError for a dataset or split that does not exist, for more rows
    than there are, and for a renamed column that no dataset has.
    """
    mixed: dict[str, list[tuple[str, Sequence[Any]]]] = {}
    for spec in parse_specs(dataset_args):
        for split, rows in limited(load_splits(spec), spec).items():
            mixed.setdefault(split, []).append((spec.name, rows))
    if columns is not None and columns.renamed:
        found = set().union(*(columns_of(rows) for parts in mixed.values() for _, rows in parts))
        check_mapped(columns.renamed, found, repr(dataset_args))
    return {split: Conversations(mixed[split], columns) for split in sorted(mixed, key=_train_first)}


def load_splits(spec: DatasetSpec) -> Splits:
    """Return the rows of one dataset by split, before limits."""
    known = KNOWN.get(hub_id(spec.name))
    path = spec.path
    if "lang" in spec.selectors and not hub_id(spec.name).startswith("OpenCoder-LLM/opc-sft"):
        raise DataError(f"dataset_args: {spec}: lang is known for OpenCoder-LLM/opc-sft-stage1 and -stage2 only.")
    if path.is_file() or suffix_of(path) in SUFFIXES:
        _refuse_name(spec)
        return {"train": read_file(path)}
    if any((path / file).is_file() for file in SAVED):
        _refuse_name(spec)
        return read_directory(path)
    if path.exists() and not path.is_dir():
        raise DataError(f"dataset: {str(path)!r} is neither a file nor a folder.")
    if not path.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.name):
        raise DataError(f"dataset: {spec.name!r} does not exist, and is no hub id (owner/name) either.")
    return _from_hub(path if path.exists() else spec.name, spec, known or HubDataset())


def hub_id(name: str) -> str:
    """Return the last two parts of a name: the hub id itself, or that of a local copy."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def limited(splits: Splits, spec: DatasetSpec) -> Splits:
    """Apply a spec's limits, see `load_conversations`."""
    limits = spec.limits
    if not limits:
        return splits
    if len(splits) > 1:
        for split, count in limits.items():
            if split not in splits:
                raise DataError(f"dataset_args: {spec}: there is no split {split!r}; there are {', '.join(splits)}.")
            _check_count(spec, split, count, len(splits[split]))
        return {split: cut(rows, 0, limits.get(split, len(rows))) for split, rows in splits.items()}
    rows = next(iter(splits.values()))
    _check_count(spec, " and ".join(limits), sum(limits.values()), len(rows))
    found, end = {}, len(rows)
    for split in reversed([each for each in limits if each != "train"]):
        found[split] = cut(rows, end - limits[split], end)
        end -= limits[split]
    if "train" in limits:
        found["train"] = cut(rows, 0, limits["train"])
    return found


def cut(rows: Any, start: int, stop: int) -> Any:
    """Return rows start..stop-1 of a list or a dataset."""
    return rows[start:stop] if isinstance(rows, list) else rows.select(range(start, stop))


def _check_count(spec: DatasetSpec, split: str, count: int, available: int) -> None:
    if count > available:
        raise DataError(f"dataset_args: {spec} asks for {count} rows ({split}), but there are {available}.")


def _refuse_name(spec: DatasetSpec) -> None:
    if "name" in spec.selectors:
        raise DataError(f"dataset_args: {spec}: name selects a configuration of a hub dataset; this is a local one.")


def _train_first(split: str) -> tuple[bool, str]:
    return split != "train", split


def _from_hub(where: str | Path, spec: DatasetSpec, known: HubDataset) -> Splits:
    look_for(where)
    datasets = importlib.import_module("datasets")
    chosen = spec.selectors.get("name")
    joined: dict[str, list[Any]] = {}
    for configuration in known.configurations if chosen is None else (chosen,):
        try:
            found = datasets.load_dataset(str(where), configuration)
        except (OSError, ValueError) as error:  # missing, unreachable, or without this configuration
            raise DataError(
                f"dataset: {spec.name!r} could not be loaded, neither as a local path nor from the hub: "
                f"{' '.join(str(error).split())}"
            ) from error
        for split, rows in found.items():
            joined.setdefault(split, []).append(rows)
    splits = {split: datasets.concatenate_datasets(rows) for split, rows in joined.items()}
    if known.renamed is not None:
        splits = {new: splits[old] for old, new in known.renamed.items() if old in splits}
    if "lang" in spec.selectors:
        splits = {split: rows.filter(_speaks(spec.selectors["lang"])) for split, rows in splits.items()}
    if known.is_split and len(splits) == 1:
        only = next(iter(splits.values()))
        splits = dict(only.train_test_split(test_size=HELD_OUT, seed=SPLIT_SEED))
    return splits


def _speaks(language: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a filter for rows whose answer has a code block of exactly this language."""
    fence = re.compile(rf"^\s*```[ \t]*{re.escape(language)}[ \t]*$", re.IGNORECASE | re.MULTILINE)
    return lambda row: bool(fence.search(row.get("output") or ""))


def source_state(dataset_args: str) -> list[dict[str, Any]]:
    """Return, for every dataset, what shows whether it changed: a hash for local files; hub names as they are."""
    states = []
    for spec in parse_specs(dataset_args):
        path = spec.path
        state: dict[str, Any] = {"spec": str(spec)}
        if path.exists():
            state["path"] = os.path.abspath(path)
            state["sha256"] = _hash_of(path)
        states.append(state)
    return states


def _hash_of(path: Path) -> str:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
