"""Read rows from local files: JSON lines, JSON lists, tables, Parquet, and folders that `datasets` saved."""

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memdlm.data.layouts import to_conversation
from memdlm.data.texts import decoded, encoding_of
from memdlm.errors import DataError, did_you_mean
from memdlm.files import replace_files

__all__ = ["SUFFIXES", "read_directory", "read_file", "read_records", "suffix_of", "to_conversation", "write_jsonl"]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read rows of any known layout as conversations, see `to_conversation`.

    `path` is a .jsonl, .json (a list), .csv, .tsv or .parquet file, or a directory that `datasets` saved (its train
    split if it has splits). Raises DataError, which names file and row, for anything missing, empty, damaged, or with
    other columns.
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
    """Read the rows of one file as they are. Raises DataError, with the line number for a line that is no JSON."""
    if not path.exists():
        raise DataError(f"dataset: {str(path)!r} does not exist.")
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"dataset: {str(path)!r} has suffix {suffix!r}; possible: {', '.join(SUFFIXES)}."
            f"{did_you_mean(suffix, SUFFIXES)}"
        )
    rows = READERS[suffix.removesuffix(".gz")](path)
    if not rows:
        raise DataError(f"dataset: {str(path)!r} has no rows.")
    return rows


def suffix_of(path: Path) -> str:
    """Return a file's suffix in lower case; for a compressed file, both suffixes (.jsonl.gz)."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last == ".gz" else last


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


def _content(path: Path) -> str:
    """Return the text of a file, which may be compressed, begin with a byte order mark, or be UTF-16."""
    return decoded(_bytes(path), f"dataset: {path}")


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"dataset: {path} is no gzip file that can be read: {error}.") from error
    except OSError as error:
        raise DataError(f"dataset: {path} cannot be read: {error.strerror or error}.") from error
    return data


def _from_lines(path: Path) -> list[Any]:
    rows = []
    data = _bytes(path)
    if encoding_of(data) != "utf-8":
        data = decoded(data, f"dataset: {path}").encode()
    # Split at line feeds only: JSON strings may hold other characters that Python counts as line ends.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
                raise DataError(f"dataset: {path}, line {number} is no JSON: {error}.") from error
            if not isinstance(rows[-1], Mapping):
                raise DataError(f"dataset: {path}, line {number} holds a {type(rows[-1]).__name__}, not an object.")
    return rows


def _from_json(path: Path) -> list[Any]:
    text = _content(path)
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"dataset: {path} is no JSON: {error}.") from error
    if not isinstance(rows, list):
        raise DataError(f"dataset: {path} holds a {type(rows).__name__}; a .json file must hold a list of rows.")
    return rows


def _from_table(path: Path) -> list[Any]:
    """Read CSV or TSV with a header; quoted fields may hold line ends. Every field is text, also an empty one."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.reader(io.StringIO(_content(path), newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        twice = sorted({name for name in names if names.count(name) > 1 or not name.strip()})
        if twice:
            raise DataError(
                f"dataset: {path}: the header has an empty or repeated name: {', '.join(map(repr, twice))}."
            )
        rows = []
        for fields in reader:
            if fields and len(fields) != len(names):
                raise DataError(
                    f"dataset: {path}, line {reader.line_num} has {len(fields)} fields, but the header has "
                    f"{len(names)} ({', '.join(names)}). Quote fields that hold the separator."
                )
            if fields:
                rows.append(dict(zip(names, fields, strict=True)))
    except csv.Error as error:
        raise DataError(f"dataset: {path}, line {reader.line_num} is no row of a table: {error}.") from error
    return rows


def _from_parquet(path: Path) -> list[Any]:
    arrow = importlib.import_module("pyarrow")
    try:
        return importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"dataset: {path} is no Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _from_lines,
    ".json": _from_json,
    ".parquet": _from_parquet,
    ".csv": _from_table,
    ".tsv": _from_table,
}
"""How each suffix is read; all but .parquet may be followed by .gz."""
SUFFIXES = (*READERS, *(f"{suffix}.gz" for suffix in READERS if suffix != ".parquet"))
