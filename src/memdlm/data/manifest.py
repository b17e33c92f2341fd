"""What is known of preprocessed data: the manifest of a folder, its checksums, and where folders are.

OUT/dataset_dict.json, OUT/<split>/...   columns input_ids, labels (int32 lists), prompt_length, length
                                         and, with context_column, context_ids (int32 lists)
OUT/manifest.json                        what it was made from and with, what came out, and checksums of all files
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
        if digest_of(path) != expected:
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
