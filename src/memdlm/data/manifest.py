"""The manifest of a folder of preprocessed data, its checksums, and the index of such folders.

OUT/dataset_dict.json, OUT/<split>/...   columns input_ids, labels (int32 lists), prompt_length, length
                                         and, with context_column, context_ids (int32 lists)
OUT/manifest.json                        sources, options and tokenizer, statistics, and checksums of all files
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm.errors import DataError
from memdlm.files import cache_folder, digest_of, replace_files
from memdlm.outputs import Kind, content

MANIFEST, FORMAT, WITHOUT_CHECKSUMS = "manifest.json", 2, 1
SUMS = "files_sha256"
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


def read_manifest(folder: Path, *, optional: bool = False) -> dict[str, Any] | None:
    """Return a folder's manifest. Raises DataError when it is missing (unless `optional`) or damaged.

    With `optional`, a manifest.json of another program counts as missing.
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
        raise DataError(f"{path} is damaged: {', '.join(wrong)} does not hold what a manifest holds. {AGAIN}")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DataError unless a folder's files are as they were written; format 1 has no checksums."""
    sums = manifest.get(SUMS, {})
    if manifest["format"] == FORMAT and not sums:
        raise DataError(f"{folder / MANIFEST} is damaged: it has no checksums. {AGAIN}")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing. {AGAIN}")
        if digest_of(path) != expected:
            raise DataError(f"{path} is damaged: its checksum differs from the one in the manifest. {AGAIN}")


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the differences between a manifest and what is wanted, in words; empty if there are none."""
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
    """Return the folder that indexes preprocessed folders, in MEMDLM_CACHE or the user's cache folder."""
    return cache_folder() / "preprocessed"


def remember(folder: Path) -> None:
    """Add `folder` to the index, so that training finds it by the name of its dataset."""
    where = str(folder.absolute())
    replace_files({index_folder() / hashlib.sha256(where.encode()).hexdigest()[:16]: where.encode()})


def known_folders(root: Path) -> Iterator[Path]:
    """Yield the folders with a manifest below `root`, and those in the index, each once.

    Index entries that cannot be read are skipped: a foreign file must not stop a run.
    """
    found: dict[Path, None] = {}
    for parent, names, files in os.walk(root):
        # Hidden folders hold unfinished results.
        names[:] = sorted(name for name in names if not name.startswith("."))
        if MANIFEST in files:
            found[Path(parent).absolute()] = None
    index = index_folder()
    for note in sorted(index.iterdir()) if index.is_dir() else ():
        # The index may hold foreign files, damaged entries, and folders that were deleted.
        with suppress(OSError, ValueError):
            folder = Path(note.read_text())
            if not note.name.startswith(".") and folder.is_absolute() and (folder / MANIFEST).is_file():
                found[folder] = None
    yield from found


def _without_marker(folder: Path) -> set[str]:
    """Return the files of preprocessed data in a folder without a marker, as earlier versions wrote."""
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
"""By part of a manifest: whether its value has the right type."""
