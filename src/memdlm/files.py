"""Results that appear whole or not at all: an earlier one stays until the new one is complete."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from memdlm.errors import DataError


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write all `contents` beside their places, then move them there; on an error every place is as it was.

    Folders are made as needed. Raises DataError when one of them is, or lies under, a file.
    """
    finished = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    for path in finished:
        make_folder(path.parent)
    try:
        for temporary, content in zip(finished.values(), contents.values(), strict=True):
            temporary.write_bytes(content)
        for path, temporary in finished.items():
            os.replace(temporary, path)
    finally:
        for temporary in finished.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends without an error it takes the place of `path`."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            earlier = temporary.with_suffix(".old")
            os.replace(path, earlier)
            os.replace(temporary, path)
            shutil.rmtree(earlier)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make `path` and what is above it; raises DataError when something there is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"the folder {path} is, or lies under, a file. Name another folder.") from error


def under_base(name: str | Path, variable: str) -> Path:
    """Return where `name` is: itself if it exists or is absolute, else below the folder in environment `variable`.

    A name that is in neither place is returned as it is, for the hub.
    """
    path, base = Path(name), os.environ.get(variable, "").strip()
    if path.is_absolute() or path.exists() or not base:
        return path
    below = Path(base) / path
    return below if below.exists() else path


def name_under_base(name: str | Path, variable: str) -> str:
    """Do what `under_base` does, but return a name that is not below the folder to the letter: ./x stays ./x."""
    found = under_base(name, variable)
    return str(name) if found == Path(name) else str(found)


def cache_folder() -> Path:
    """Return the folder for what can be made again: MEMDLM_CACHE, or memdlm's own in the user's cache folder."""
    own = os.environ.get("MEMDLM_CACHE", "").strip()
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache").expanduser() / "memdlm"
