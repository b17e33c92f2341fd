"""Rows of conversations from local files."""

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memdlm.errors import DataError
from memdlm.files import replace_files

SUFFIXES = (".jsonl", ".json", ".parquet")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read rows with `messages`, or with `prompt` and `response` (which become messages).

    `path` is a .jsonl, .json (a list) or .parquet file, or a directory that `datasets` saved (its train split if it
    has splits). Raises DataError naming the file and row for anything missing, empty, broken or of other columns.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"dataset: {str(path)!r} does not exist.")
    if path.is_dir():
        rows = _from_directory(path)
    elif path.suffix == ".jsonl":
        rows = _from_lines(path)
    elif path.suffix == ".json":
        rows = _from_json(path)
    elif path.suffix == ".parquet":
        rows = importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    else:
        raise DataError(f"dataset: {str(path)!r} has suffix {path.suffix!r}; possible: {', '.join(SUFFIXES)}.")
    if not rows:
        raise DataError(f"dataset: {str(path)!r} has no rows.")
    return [_conversation(row, index, path) for index, row in enumerate(rows)]


def write_jsonl(records: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write one JSON object per line; an earlier file is replaced only when all lines are written."""
    lines = (json.dumps(dict(record)) + "\n" for record in records)
    replace_files({Path(path): "".join(lines).encode()})


def _from_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"dataset: {path}, line {number} is no JSON: {error}.") from error
    return rows


def _from_json(path: Path) -> list[Any]:
    text = path.read_text()
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"dataset: {path} is no JSON: {error}.") from error
    if not isinstance(rows, list):
        raise DataError(f"dataset: {path} holds a {type(rows).__name__}; a .json file must hold a list of rows.")
    return rows


def _from_directory(path: Path) -> list[Any]:
    datasets = importlib.import_module("datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"dataset: {str(path)!r} is no directory that `datasets` saved: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise DataError(f"dataset: {str(path)!r} has no train split; it has {', '.join(found)}.")
        found = found["train"]
    return found.to_list()


def _conversation(row: Any, index: int, path: Path) -> dict[str, Any]:
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        return dict(row)
    if isinstance(row, Mapping) and {"prompt", "response"} <= set(row):
        turns = (("user", row["prompt"]), ("assistant", row["response"]))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    raise DataError(
        f"dataset: {path}, row {index} has neither a list of 'messages' nor 'prompt' and 'response' (it has: {keys})."
    )
