"""The preprocessing cache: a tokenized dataset as a folder that `datasets` opens, with a manifest of how it was made.

    OUT/dataset_dict.json, OUT/<split>/...   columns input_ids, labels (int32 lists), prompt_length, length
                                             and, with context_column, context_ids (int32 lists)
    OUT/manifest.json                        what it was made from and with, what came out, and checksums of all files

Finished pieces wait in `.OUT.partial` until all are there; an interrupted job goes on where it stopped. A piece has its
checksum in its name, so that one that was damaged is made again.
"""

import glob
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm.data.encoding import COLUMNS, CONTEXT, EncodingOptions, in_parallel
from memdlm.data.sources import source_state
from memdlm.errors import DataError
from memdlm.files import cache_folder, make_folder, replace_files, sha256, writing
from memdlm.outputs import Kind, Output, content, find, output_folder
from memdlm.version import __version__

MANIFEST, FORMAT, WITHOUT_CHECKSUMS = "manifest.json", 2, 1
SUMS = "files_sha256"
PIECE = 1024
"""Conversations per file of the partial result: what an interruption costs at most, per worker."""
HISTOGRAM = tuple(2**power for power in range(5, 18))
"""Upper bounds, in tokens, of the bins of the length histogram; a last bin holds what is longer."""


AGAIN = "Preprocess again, with --overwrite if it is the same folder."


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what identifies a tokenizer: hashes of its vocabulary and chat template, and its special ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")},
    }


def preprocess(
    splits: Mapping[str, Sequence[dict[str, Any]]],
    dataset_args: str,
    tokenizer: PreTrainedTokenizerBase,
    options: EncodingOptions,
    out: Path,
    *,
    num_proc: int = 1,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Tokenize `splits` (what `dataset_args` names) into folder `out` and return its manifest.

    A folder with the same manifest is left as it is. Conversations are kept at full length: `max_length` is applied
    when training, so one folder serves every length. Raises DataError when `out` holds other preprocessed data, or
    damaged ones, and `overwrite` is off, and for a row that cannot be encoded; ConfigError when `out` holds anything
    else, or another process writes there.
    """
    made_with = {
        "format": FORMAT,
        "dataset_args": dataset_args,
        "sources": source_state(dataset_args),
        "tokenizer": tokenizer_state(tokenizer),
        "options": asdict(options),
    }
    find(out, PREPROCESSED)
    found = None if overwrite else _finished(out, made_with)
    if found is not None:
        return found
    with output_folder(out, PREPROCESSED, overwrite=overwrite, option="output_dir") as output, writing(out):
        return _tokenized(splits, made_with, tokenizer, options, output, num_proc, advance)


def _tokenized(
    splits: Mapping[str, Sequence[dict[str, Any]]],
    made_with: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: EncodingOptions,
    output: Output,
    num_proc: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
    partial = output.place.with_name(f".{output.place.name}.partial")
    _clear(partial, but=key)
    make_folder(partial / key)
    done = 0
    pieces: dict[str, list[Path]] = {}
    for split, conversations in splits.items():
        starts = range(0, len(conversations), PIECE)
        found = {start: _whole_piece(partial / key, split, start) for start in starts}
        missing = [start for start in starts if found[start] is None]
        done += len(conversations) - sum(min(PIECE, len(conversations) - start) for start in missing)
        advance(done)
        encoded = in_parallel(conversations, missing, PIECE, tokenizer, options, num_proc)
        for rows, start in zip(encoded, missing, strict=True):
            found[start] = _write_piece(rows, partial / key, split, start)
            done += len(rows)
            advance(done)
        pieces[split] = [file for file in found.values() if file is not None]
    manifest = _assemble(pieces, made_with, output)
    _clear(partial)
    remember(output.place)
    return manifest


def _clear(partial: Path, but: str | None = None) -> None:
    """Delete finished pieces, except those of the job `but`, and nothing else."""
    for folder in [each for each in partial.iterdir() if each.name != but] if partial.is_dir() else ():
        if _JOB.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            for file in folder.iterdir():
                if _PIECE_NAME.fullmatch(file.name):
                    file.unlink()
            with suppress(OSError):  # somebody's files are in it
                folder.rmdir()
    with suppress(OSError):  # there is none, or another job's pieces are in it
        partial.rmdir()


_JOB = re.compile(r"[0-9a-f]{16}")
_PIECE_NAME = re.compile(r".+-\d{9}(\.[0-9a-f]{16}|)(\.\d+\.tmp|\.arrow)")


def _whole_piece(folder: Path, split: str, start: int) -> Path | None:
    """Return the finished piece, None when there is none that is as it was written."""
    for file in folder.glob(f"{glob.escape(split)}-{start:09d}.*.arrow"):
        if file.suffixes[-2:-1] == [f".{sha256(file)[:16]}"]:
            return file
        file.unlink()
    return None


def _finished(out: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a finished folder that serves, None where there is no preprocessed data.

    Raises DataError for one that was made otherwise, or is damaged.
    """
    try:
        found = read_manifest(out, optional=True)
        words = [] if found is None else differences(found, made_with)
        if found is not None and not words:
            check_files(out, found)
    except DataError as error:
        found, words = None, [str(error)]
    if words:
        raise DataError(
            f"output_dir: {str(out)!r} is not empty and holds something else ({'; '.join(words)}). Name another "
            "folder, or add --overwrite."
        )
    return found


def _write_piece(rows: Sequence[Mapping[str, Any]], folder: Path, split: str, start: int) -> Path:
    arrow = importlib.import_module("pyarrow")
    whole = arrow.int32()
    types = dict(zip(COLUMNS, (arrow.list_(whole), arrow.list_(whole), whole, whole), strict=True))
    if CONTEXT in rows[0]:
        types[CONTEXT] = arrow.list_(whole)
    schema = arrow.schema(list(types.items()))
    temporary = folder / f"{split}-{start:09d}.{os.getpid()}.tmp"
    with arrow.ipc.new_stream(str(temporary), schema) as stream:
        stream.write_table(arrow.Table.from_pydict({name: [row[name] for row in rows] for name in types}, schema))
    file = folder / f"{split}-{start:09d}.{sha256(temporary)[:16]}.arrow"
    os.replace(temporary, file)
    return file


def _assemble(pieces: Mapping[str, Sequence[Path]], made_with: Mapping[str, Any], output: Output) -> dict[str, Any]:
    datasets = importlib.import_module("datasets")
    splits = datasets.DatasetDict(
        {
            split: datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
            for split, files in pieces.items()
            if files
        }
    )
    manifest = {
        **made_with,
        "memdlm": __version__,
        "splits": {name: _statistics(rows) for name, rows in splits.items()},
    }
    with output.replaced() as folder:
        splits.save_to_disk(str(folder))
        manifest[SUMS] = {name: sha256(folder / name) for name in sorted(content(folder)) if name[-1] != "/"}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _statistics(rows: Any) -> dict[str, Any]:
    lengths, prompts = rows["length"][:], rows["prompt_length"][:]
    bins = dict.fromkeys([*map(str, HISTOGRAM), "longer"], 0)
    for length in lengths:
        bins[next((str(bound) for bound in HISTOGRAM if length <= bound), "longer")] += 1
    return {
        "rows": len(rows),
        "without_target": sum(prompt >= length for prompt, length in zip(prompts, lengths, strict=True)),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "lengths_up_to": bins,
    }


def read_manifest(folder: Path, *, optional: bool = False) -> dict[str, Any] | None:
    """Return a folder's manifest. Raises DataError when there is none (unless `optional`) or it is broken.

    `optional` forgives as well what another program calls manifest.json.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if optional:
            return None
        raise DataError(f"{str(folder)!r} has no {MANIFEST}: `memdlm preprocess` did not write it.")
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}. {AGAIN}") from error
    if not isinstance(manifest, dict) or not {"format", "dataset_args", "tokenizer", "options"} <= set(manifest):
        if optional:
            return None
        raise DataError(f"{path} is damaged, or `memdlm preprocess` did not write it: keys are missing. {AGAIN}")
    if manifest["format"] not in (WITHOUT_CHECKSUMS, FORMAT):
        raise DataError(f"{path}: format {manifest['format']!r}, expected {FORMAT}. {AGAIN}")
    wrong = [name for name, check in _SHAPES.items() if not check(manifest.get(name))]
    if wrong:
        raise DataError(f"{path} is damaged: {', '.join(wrong)} does not say what a manifest says. {AGAIN}")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DataError unless the files of a folder are those that were written; format 1 has no checksums."""
    sums = manifest.get(SUMS, {})
    if manifest["format"] == FORMAT and not sums:
        raise DataError(f"{folder / MANIFEST} is damaged: it has no checksums. {AGAIN}")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing. {AGAIN}")
        if sha256(path) != expected:
            raise DataError(f"{path} is damaged: its checksum is not that of what was written. {AGAIN}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say where a manifest differs from what is wanted, in words; empty: it serves."""
    words = []
    for part in ("dataset_args", "tokenizer", "options", "sources"):
        if part not in wanted or found.get(part) == wanted[part]:
            continue
        if part == "sources":
            words.append("the data has changed since")
        elif isinstance(wanted[part], Mapping):
            for name, value in wanted[part].items():
                if found.get(part, {}).get(name) != value:
                    words.append(f"{part} {name}: made with {found.get(part, {}).get(name)}, wanted {value}")
        else:
            words.append(f"{part}: made from {found.get(part)!r}, wanted {wanted[part]!r}")
    return words


def index_folder() -> Path:
    """Where the places of preprocessed folders are noted: MEMDLM_CACHE, or the user's cache folder."""
    return cache_folder() / "preprocessed"


def remember(folder: Path) -> None:
    """Note where `folder` is, so that training finds it by the name of its dataset."""
    where = str(folder.absolute())
    replace_files({index_folder() / hashlib.sha256(where.encode()).hexdigest()[:16]: where.encode()})


def known_folders(root: Path) -> Iterator[Path]:
    """Yield the folders with a manifest below `root`, and those that were noted, each once.

    What cannot be read is passed over: somebody else's file stops no run.
    """
    found: dict[Path, None] = {}
    for parent, names, files in os.walk(root):
        # Hidden folders are pieces and unfinished results.
        names[:] = sorted(name for name in names if not name.startswith("."))
        if MANIFEST in files:
            found[Path(parent).absolute()] = None
    index = index_folder()
    for note in sorted(index.iterdir()) if index.is_dir() else ():
        # Notes of others, notes that were damaged, and folders that are gone.
        with suppress(OSError, ValueError):
            folder = Path(note.read_text())
            if not note.name.startswith(".") and folder.is_absolute() and (folder / MANIFEST).is_file():
                found[folder] = None
    yield from found


def _without_marker(folder: Path) -> set[str]:
    """Return what is preprocessed data's in a folder that has no marker: earlier versions wrote none."""
    try:
        splits = (read_manifest(folder, optional=True) or {}).get("splits", {})
    except DataError:
        return set()
    names = {"dataset_dict.json", MANIFEST, *(f"{split}/" for split in splits)}
    inside = re.compile("|".join(rf"{re.escape(split)}/({_ARROW})" for split in splits) or "(?!)")
    return {name for name in content(folder) if name in names or inside.fullmatch(name)} if splits else set()


_ARROW = r"data-\d{5}-of-\d{5}\.arrow|dataset_info\.json|state\.json"
PREPROCESSED = Kind(name="preprocessed data", words="preprocessed data", earlier=_without_marker)
_SHAPES: Mapping[str, Callable[[Any], bool]] = {
    "sources": lambda found: (
        isinstance(found, list) and all(isinstance(each, dict) and "spec" in each for each in found)
    ),
    "tokenizer": lambda found: isinstance(found, dict),
    "options": lambda found: isinstance(found, dict),
    "splits": lambda found: isinstance(found, dict),
    SUMS: lambda found: found is None or isinstance(found, dict),
}
"""What the parts of a manifest are, wherever it comes from."""
