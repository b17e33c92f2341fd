"""The preprocessing cache: a tokenized dataset as a folder that `datasets` opens, with a manifest of how it was made.

    OUT/dataset_dict.json, OUT/<split>/...   columns input_ids, labels (int32 lists), prompt_length, length
                                             and, with context_column, context_ids (int32 lists)
    OUT/manifest.json                        what it was made from and with, and what came out

Finished pieces wait in `.OUT.partial` until all are there; an interrupted job goes on where it stopped.
"""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm import __version__
from memdlm.data.encoding import COLUMNS, CONTEXT, EncodingOptions, in_parallel
from memdlm.data.sources import source_state
from memdlm.errors import DataError
from memdlm.files import cache_folder, make_folder, replace_files, replace_folder

MANIFEST, FORMAT = "manifest.json", 2
PIECE = 1024
"""Conversations per file of the partial result: what an interruption costs at most, per worker."""
HISTOGRAM = tuple(2**power for power in range(5, 18))
"""Upper bounds, in tokens, of the bins of the length histogram; a last bin holds what is longer."""


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
    when training, so one folder serves every length. Raises DataError when `out` holds anything else and `overwrite`
    is off, and for a row that cannot be encoded.
    """
    made_with = {
        "format": FORMAT,
        "dataset_args": dataset_args,
        "sources": source_state(dataset_args),
        "tokenizer": tokenizer_state(tokenizer),
        "options": asdict(options),
    }
    if out.exists() and not overwrite:
        found = _finished(out, made_with)
        if found is not None:
            return found
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
    partial = out.absolute().parent / f".{out.name}.partial"
    if not (partial / key).is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial / key)
    done = 0
    pieces: dict[str, list[Path]] = {}
    for split, conversations in splits.items():
        starts = range(0, len(conversations), PIECE)
        pieces[split] = [partial / key / f"{split}-{start:09d}.arrow" for start in starts]
        missing = [place for place in zip(starts, pieces[split], strict=True) if not place[1].exists()]
        done += len(conversations) - sum(min(PIECE, len(conversations) - start) for start, _ in missing)
        advance(done)
        wanted = [start for start, _ in missing]
        encoded = in_parallel(conversations, wanted, PIECE, tokenizer, options, num_proc)
        for rows, (_, file) in zip(encoded, missing, strict=True):
            _write_piece(rows, file)
            done += len(rows)
            advance(done)
    manifest = _assemble(pieces, made_with, out)
    shutil.rmtree(partial)
    remember(out)
    return manifest


def _finished(out: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a finished folder that serves, None for an empty one; raises DataError for others."""
    if out.is_dir() and not any(out.iterdir()):
        return None
    found = read_manifest(out, optional=True)
    words = ["no preprocessed data"] if found is None else differences(found, made_with)
    if words:
        raise DataError(
            f"output_dir: {str(out)!r} is not empty and holds something else ({'; '.join(words)}). Name another "
            "folder, or add --overwrite."
        )
    return found


def _write_piece(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    arrow = importlib.import_module("pyarrow")
    whole = arrow.int32()
    types = dict(zip(COLUMNS, (arrow.list_(whole), arrow.list_(whole), whole, whole), strict=True))
    if CONTEXT in rows[0]:
        types[CONTEXT] = arrow.list_(whole)
    schema = arrow.schema(list(types.items()))
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with arrow.ipc.new_stream(str(temporary), schema) as stream:
        stream.write_table(arrow.Table.from_pydict({name: [row[name] for row in rows] for name in types}, schema))
    os.replace(temporary, file)


def _assemble(pieces: Mapping[str, Sequence[Path]], made_with: Mapping[str, Any], out: Path) -> dict[str, Any]:
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
    make_folder(out.parent)
    with replace_folder(out) as folder:
        splits.save_to_disk(str(folder))
        replace_files({folder / MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode()})
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
    """Return a folder's manifest. Raises DataError when there is none (unless `optional`) or it is broken."""
    path = folder / MANIFEST
    if not path.is_file():
        if optional:
            return None
        raise DataError(f"{str(folder)!r} has no {MANIFEST}: `memdlm preprocess` did not write it.")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise DataError(f"{path}: format {manifest['format']!r}, expected {FORMAT}; preprocess again.")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}. Preprocess again.") from error
    return dict(manifest)


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


def known_folders(root: Path) -> list[Path]:
    """Return the preprocessed folders below `root`, and those that were noted, without repetition."""
    found = {path.parent.absolute(): None for path in sorted(root.rglob(MANIFEST))} if root.is_dir() else {}
    index = index_folder()
    for note in sorted(index.iterdir()) if index.is_dir() else ():
        if note.name.startswith("."):
            continue
        folder = Path(note.read_text())
        if (folder / MANIFEST).is_file():
            found[folder] = None
    return list(found)
