"""Rows to train on, by dataset name: from a preprocessed folder that fits, or encoded here."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm.data.encoding import EncodingOptions
from memdlm.data.preprocess import PREPROCESSED, check_files, differences, known_folders, read_manifest, tokenizer_state
from memdlm.data.records import read_directory
from memdlm.data.sources import BASE_VARIABLE, limited, source_state
from memdlm.data.specs import DatasetSpec, parse_specs
from memdlm.errors import DataError
from memdlm.files import under_base
from memdlm.outputs import find


def load_preprocessed(
    dataset_args: str, tokenizer: PreTrainedTokenizerBase, options: EncodingOptions, root: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({split: Dataset}, manifests by folder) of a mixture that `memdlm preprocess` has tokenized.

    Each part of `dataset_args` is a preprocessed folder (limits apply to it), or the whole is what such a folder was
    made from: then the folder is looked for below `root` and among those that were noted when they were written.
    Raises DataError when none is found, when tokenizer, chat template, options or data differ from the manifest's, and
    when a file is not what was written (its checksum differs).
    """
    wanted = {"tokenizer": tokenizer_state(tokenizer), "options": asdict(options)}
    if options.context_column is None:
        # A context that the folder has beside its conversations does no harm to a run without one.
        del wanted["options"]["context_column"]
    folder, unread = _made_from(dataset_args, wanted, root)
    if folder is not None:
        manifest = read_manifest(folder) or {}
        check_files(folder, manifest)
        return read_directory(folder), {str(folder): manifest}
    mixed: dict[str, list[Any]] = {}
    manifests: dict[str, Any] = {}
    for spec in parse_specs(dataset_args):
        path = under_base(spec.name, BASE_VARIABLE)
        find(path, PREPROCESSED)
        if not path.is_dir() or read_manifest(path, optional=True) is None:
            raise DataError(_not_found(dataset_args, spec, root) + "".join(f" Passed over: {each}" for each in unread))
        manifests[str(path)] = _serving(path, wanted)
        for split, rows in limited(read_directory(path), spec).items():
            mixed.setdefault(split, []).append(rows)
    return {split: _joined(parts) for split, parts in mixed.items()}, manifests


def _made_from(dataset_args: str, wanted: Mapping[str, Any], root: Path) -> tuple[Path | None, list[str]]:
    """Return the folder that was made from exactly these datasets and serves, or None when there is none at all.

    Folders whose manifest is damaged stop nobody: the second value says which they are.
    """
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
        # A relative name means another file where a command runs in another folder.
        if _names(manifest["sources"]) != _names(state):
            continue
        words = differences(manifest, {**wanted, "sources": state})
        if not words:
            return folder, unread
        close.append(f"{folder}: {'; '.join(words)}")
    if close:
        raise DataError(
            f"load_preprocessed_data: {dataset_args!r} was preprocessed, but not for this run. {' | '.join(close)}. "
            "Run memdlm preprocess again with this run's model and options."
        )
    return None, unread


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
        f"load_preprocessed_data: {spec.name!r} is no preprocessed folder, and none below {str(root)!r} or noted "
        f"elsewhere was made from {dataset_args!r}. Write one: memdlm preprocess --model MODEL --dataset_args "
        f"{dataset_args!r} --output_dir FOLDER."
    )


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else importlib.import_module("datasets").concatenate_datasets(parts)
