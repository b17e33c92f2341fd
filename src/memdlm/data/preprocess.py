"""Preprocessed data: a tokenized dataset as a folder that `datasets` opens, written and read here (see `manifest`).

Finished pieces are kept in `.OUT.partial` until all are finished, so that an interrupted job continues where it
stopped. A piece has its checksum in its name, so that a damaged piece is made again.
"""

import glob
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm.data.encoding import COLUMNS, CONTEXT, EncodingOptions, context_lengths, in_parallel
from memdlm.data.manifest import (
    FORMAT,
    MANIFEST,
    PREPROCESSED,
    SUMS,
    check_files,
    differences,
    known_folders,
    read_manifest,
    remember,
    tokenizer_state,
)
from memdlm.data.records import read_directory
from memdlm.data.sources import limited, source_state
from memdlm.data.specs import DatasetSpec, parse_specs
from memdlm.errors import DataError
from memdlm.files import digest_of, make_folder, writing
from memdlm.outputs import Output, content, find, output_folder
from memdlm.version import __version__

PIECE = 1024
"""Conversations per piece: the most work that an interruption costs each worker."""
HISTOGRAM = tuple(2**power for power in range(5, 18))
"""Upper bounds, in tokens, of the bins of the length histogram; a last bin counts longer rows."""


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
    """Tokenize `splits` (the datasets of `dataset_args`) into folder `out` and return its manifest.

    A folder with the same manifest is left as it is. Conversations are kept at full length: training applies
    `max_length`, so one folder serves every length. Raises DataError for a row that cannot be encoded, and, if
    `overwrite` is off, when `out` holds other or damaged preprocessed data. Raises ConfigError when `out` holds
    anything else, or another process writes there.
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
            with suppress(OSError):  # foreign files are in it
                folder.rmdir()
    with suppress(OSError):  # it does not exist, or holds another job's pieces
        partial.rmdir()


_JOB = re.compile(r"[0-9a-f]{16}")
_PIECE_NAME = re.compile(r".+-\d{9}(\.[0-9a-f]{16}|)(\.\d+\.tmp|\.arrow)")


def _whole_piece(folder: Path, split: str, start: int) -> Path | None:
    """Return the finished piece; None if there is none, or only a damaged one."""
    for file in folder.glob(f"{glob.escape(split)}-{start:09d}.*.arrow"):
        if file.suffixes[-2:-1] == [f".{digest_of(file)[:16]}"]:
            return file
        file.unlink()
    return None


def _finished(out: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a finished folder that fits `made_with`; None if there is no preprocessed data.

    Raises DataError for a folder that was made differently, or is damaged.
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
    file = folder / f"{split}-{start:09d}.{digest_of(temporary)[:16]}.arrow"
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
        manifest[SUMS] = {name: digest_of(folder / name) for name in sorted(content(folder)) if name[-1] != "/"}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _statistics(rows: Any) -> dict[str, Any]:
    lengths, prompts = rows["length"][:], rows["prompt_length"][:]
    bins = dict.fromkeys([*map(str, HISTOGRAM), "longer"], 0)
    for length in lengths:
        bins[next((str(bound) for bound in HISTOGRAM if length <= bound), "longer")] += 1
    contexts = context_lengths(rows) if CONTEXT in rows.column_names else None
    return {
        "rows": len(rows),
        "without_target": sum(prompt >= length for prompt, length in zip(prompts, lengths, strict=True)),
        # Only where there are some: what a folder holds stays what it was before rows could have none.
        **({"without_context": contexts.count(0)} if contexts and 0 in contexts else {}),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "lengths_up_to": bins,
    }


def load_preprocessed(
    dataset_args: str,
    tokenizer: PreTrainedTokenizerBase,
    options: EncodingOptions,
    root: Path,
    *,
    may_be_bare: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({split: Dataset}, manifests by folder) of a mixture that `memdlm preprocess` has tokenized.

    Either each part of `dataset_args` is a preprocessed folder (with limits, if given), or `dataset_args` as a whole is
    what such a folder was made from. In the second case the folder is looked for below `root` and in the index of
    written folders. Raises DataError when none is found, when tokenizer, chat template, options or data differ from the
    manifest's, and when the checksum of a file differs.

    Folders without contexts serve a run with `context_column` beside others that have them, if they are named; alone,
    and as what they were made from, if they `may_be_bare`.
    """
    wanted = {"tokenizer": tokenizer_state(tokenizer), "options": asdict(options)}
    if options.context_column is None:
        # A run without contexts can use a folder with contexts.
        del wanted["options"]["context_column"]
    folder, unread = _made_from(dataset_args, wanted, root, may_be_bare=may_be_bare)
    if folder is not None:
        manifest = read_manifest(folder) or {}
        check_files(folder, manifest)
        return read_directory(folder), {str(folder): manifest}
    mixed: dict[str, list[Any]] = {}
    manifests: dict[str, Any] = {}
    specs, bare = parse_specs(dataset_args), set[Path]()
    for spec in specs:
        find(spec.path, PREPROCESSED)
        made = read_manifest(spec.path, optional=True) if spec.path.is_dir() else None
        if made is None:
            raise DataError(_not_found(dataset_args, spec, root) + "".join(f" Skipped: {each}" for each in unread))
        if made["options"].get("context_column") is None:
            bare.add(spec.path)
    may_be_bare = may_be_bare or any(spec.path not in bare for spec in specs)
    for spec in specs:
        path, needed = spec.path, wanted
        if path in bare and may_be_bare:
            needed = _bare(wanted)
        manifests[str(path)] = _serving(path, needed)
        for split, rows in limited(read_directory(path), spec).items():
            mixed.setdefault(split, []).append(rows)
    return {split: _joined(parts) for split, parts in mixed.items()}, manifests


def _bare(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a folder is made with, none of whose rows has a context, as some rows of other folders."""
    return {**wanted, "options": wanted["options"] | {"context_column": None}}


def _made_from(
    dataset_args: str, wanted: Mapping[str, Any], root: Path, *, may_be_bare: bool
) -> tuple[Path | None, list[str]]:
    """Return the folder that was made from exactly these datasets and fits, or None if there is none.

    One with contexts comes before one without, which fits if it `may_be_bare`. Folders with a damaged manifest are
    skipped; the second value lists why.
    """
    without: Path | None = None
    state = source_state(dataset_args)
    close: list[str] = []
    unread: list[str] = []
    for folder in known_folders(root):
        try:
            manifest = read_manifest(folder, optional=True)
        except DataError as error:
            unread.append(str(error))
            continue
        if manifest is None:
            continue
        # A relative name may mean different files for commands run in different folders.
        if _names(manifest["sources"]) != _names(state):
            continue
        words = differences(manifest, {**wanted, "sources": state})
        if not words:
            return folder, unread
        if may_be_bare and not differences(manifest, {**_bare(wanted), "sources": state}):
            without = folder
        close.append(f"{folder}: {'; '.join(words)}")
    if close and without is None:
        raise DataError(
            f"load_preprocessed_data: {dataset_args!r} was preprocessed, but not for this run. {' | '.join(close)}. "
            "Run memdlm preprocess again with this run's model and options."
        )
    return without, unread


def _names(sources: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    return [(source["spec"], source.get("path")) for source in sources]


def _serving(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(folder) or {}
    words = differences(manifest, wanted)
    if words:
        raise DataError(
            f"load_preprocessed_data: {str(folder)!r} was made for something else. {'; '.join(words)}. "
            "Run memdlm preprocess again with this run's model and options."
        )
    check_files(folder, manifest)
    return manifest


def _not_found(dataset_args: str, spec: DatasetSpec, root: Path) -> str:
    return (
        f"load_preprocessed_data: {spec.name!r} is no preprocessed folder, and no folder below {str(root)!r} or "
        f"in the index was made from {dataset_args!r}. Write one: memdlm preprocess --model MODEL --dataset_args "
        f"{dataset_args!r} --output_dir FOLDER."
    )


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else importlib.import_module("datasets").concatenate_datasets(parts)
