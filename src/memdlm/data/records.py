"""Rows of conversations from local files, and the column layouts that are conversations."""

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memdlm.errors import DataError
from memdlm.files import replace_files

SUFFIXES = (".jsonl", ".json", ".parquet")
ANSWERS = (("prompt", "response"), ("instruction", "output"), ("instruction", "response"))
"""Columns of one-turn conversations; with `instruction`, a non-empty `input` follows it after a blank line."""


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read rows with `messages`, or with `prompt` and `response` (which become messages), see `to_conversation`.

    `path` is a .jsonl, .json (a list) or .parquet file, or a directory that `datasets` saved (its train split if it
    has splits). Raises DataError naming the file and row for anything missing, empty, broken or of other columns.
    """
    path = Path(path)
    if path.is_dir():
        splits = read_directory(path)
        if "train" not in splits:
            raise DataError(f"dataset: {str(path)!r} has no train split; it has {', '.join(splits)}.")
        rows: Sequence[Any] = splits["train"]
        if len(rows) == 0:
            raise DataError(f"dataset: {str(path)!r} has no rows.")
    else:
        rows = read_file(path)
    return [to_conversation(row, f"{path}, row {index}") for index, row in enumerate(rows)]


def read_file(path: Path) -> list[Any]:
    """Read the rows of one file as they are. Raises DataError; a line that is no JSON is named by its number."""
    if not path.exists():
        raise DataError(f"dataset: {str(path)!r} does not exist.")
    if path.suffix == ".jsonl":
        rows = _from_lines(path)
    elif path.suffix == ".json":
        rows = _from_json(path)
    elif path.suffix == ".parquet":
        rows = _from_parquet(path)
    else:
        raise DataError(f"dataset: {str(path)!r} has suffix {path.suffix!r}; possible: {', '.join(SUFFIXES)}.")
    if not rows:
        raise DataError(f"dataset: {str(path)!r} has no rows.")
    return rows


def read_directory(path: Path) -> dict[str, Any]:
    """Open a folder that `datasets` saved: {split: Dataset}; a single dataset is `train`."""
    datasets = importlib.import_module("datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"dataset: {str(path)!r} is no directory that `datasets` saved: {error}") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def write_jsonl(records: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write one JSON object per line; an earlier file is replaced only when all lines are written."""
    replace_files({Path(path): as_jsonl(records)})


def as_jsonl(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return one JSON object per line."""
    return "".join(json.dumps(dict(record)) + "\n" for record in records).encode()


def to_conversation(row: Any, where: str) -> dict[str, Any]:
    """Return a row with `messages`, from its columns. Raises DataError that says `where` it is and what it has."""
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return dict(row)
    for question, answer in ANSWERS:
        if isinstance(row, Mapping) and {question, answer} <= set(row):
            asked, context = row[question], row.get("input") if question == "instruction" else None
            for name, value in ((question, asked), (answer, row[answer])):
                if not isinstance(value, str):
                    raise DataError(f"dataset: {where}: {name!r} must be text, got {value!r}.")
            # As published: instruction, blank line, input.
            if question == "instruction":
                asked = f"{asked}\n\n{context}".strip() if context else asked.strip()
            reply = row[answer].strip() if question == "instruction" else row[answer]
            turns = (("user", asked), ("assistant", reply))
            rest = {name: value for name, value in row.items() if name not in (question, answer)}
            return {**rest, "messages": [{"role": role, "content": content} for role, content in turns]}
    keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    raise DataError(
        f"dataset: {where} has neither a list of 'messages' nor 'prompt' and 'response' (or 'instruction' and "
        f"'output'); it has: {keys}."
    )


def _from_lines(path: Path) -> list[Any]:
    rows = []
    # Cut at line feeds alone: a JSON string may hold other separators that Python counts as line ends.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:  # no JSON, or no UTF-8
                raise DataError(f"dataset: {path}, line {number} is no JSON: {error}.") from error
            if not isinstance(rows[-1], Mapping):
                raise DataError(f"dataset: {path}, line {number} holds a {type(rows[-1]).__name__}, not an object.")
    return rows


def _from_json(path: Path) -> list[Any]:
    text = path.read_bytes()
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"dataset: {path} is no JSON: {error}.") from error
    if not isinstance(rows, list):
        raise DataError(f"dataset: {path} holds a {type(rows).__name__}; a .json file must hold a list of rows.")
    return rows


def _from_parquet(path: Path) -> list[Any]:
    arrow = importlib.import_module("pyarrow")
    try:
        return importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"dataset: {path} is no Parquet file: {error}") from error
