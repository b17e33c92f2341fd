"""The output folder of a training run: one run at a time writes there, and replaces only what runs wrote."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memdlm.errors import ConfigError
from memdlm.files import resolved
from memdlm.locks import locked
from memdlm.outputs import Kind, content, is_page, marked_as, refuse_place, written_in

STATE = "trainer_state.json"
RUN_FILE = "run.json"
"""File in the output folder of every run; it marks the folder as memdlm's."""
LOCK = ".memdlm.lock"
_WEIGHTS = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|adapter_config\.json|memory_init\.(json|safetensors)"
)
_MODEL = (
    rf"{_WEIGHTS.pattern}|(generation_)?config\.json|training_args\.bin|tokenizer[\w.-]*|special_tokens_map\.json|"
    r"added_tokens\.json|(additional_)?chat_template[\w./-]*|vocab\.\w+|merges\.txt|trainer_state\.json|\.memdlm\.json"
)
_OF_RUN = re.compile(rf"{_MODEL}|run\.json|\.saving(-final)?|\.checkpoint-\d+\.old|\.[\w.-]+\.\d+\.tmp")
"""What a run writes into its output folder, besides checkpoints."""
_OF_CHECKPOINT = re.compile(
    rf"{_MODEL}|(optimizer|scheduler|scaler|rng_state)[\w./-]*|global_step\d+[\w./-]*|latest|zero_to_fp32\.py|"
    r"pytorch_model[\w./-]*|README\.md"
)
"""What transformers and the launchers write into a checkpoint."""
_TRACKERS = ("runs", "logs", "wandb", "mlruns", "trackio", "tensorboard")
"""Folders of trackers: a run adds to them and replaces nothing there."""


@contextmanager
def held(folder: Path, sources: Sequence[str | Path], *, goes_on: bool) -> Iterator[None]:
    """Hold the output folder of a run inside the block; it must exist.

    Raises ConfigError, and touches nothing, when another run writes there, when it is the folder of one of the
    `sources` (a model or an adapter that the run starts from), and when `refuse_others` does.
    """
    refuse_others(folder, goes_on=goes_on)
    for source in sources:
        if os.path.isdir(source) and os.path.samefile(source, folder):
            raise ConfigError(
                f"output_dir: {str(folder)!r} is the folder of the model that the run starts from; the run would "
                "overwrite it. Name another folder."
            )
    with locked(resolved(folder) / LOCK, folder):
        yield


def refuse_others(folder: Path, *, goes_on: bool) -> None:
    """Raise ConfigError when `folder` holds anything that no training run wrote.

    A run that resumes in its own folder ignores what it never writes, such as notes. Results of other memdlm commands
    are left alone, too.
    """
    refuse_place(resolved(folder), folder, "output_dir")
    if not folder.is_dir():
        return
    is_ours = is_run(folder) or marked_as(folder) == FINAL.name
    for path in sorted(folder.iterdir()):
        if is_checkpoint_name(path.name):
            foreign = foreign_in(path)
            if foreign:
                raise ConfigError(refusal(folder, f"{path.name}/{foreign[0]}".rstrip("/@")))
        elif is_ours and (goes_on or _OF_RUN.fullmatch(path.name)):
            continue
        elif path.name not in (LOCK, *_TRACKERS) and not _is_result(path):
            raise ConfigError(refusal(folder, path.name))


def refusal(folder: Path, name: str) -> str:
    """Return the message that no training run wrote `name` in `folder`."""
    return (
        f"output_dir: {str(folder)!r} holds {name!r}, which no training run of memdlm wrote; it replaces only what it "
        "made itself. Name a new folder, or move {name!r} away."
    )


def is_run(folder: Path) -> bool:
    """Whether a training run of memdlm wrote into `folder`: its run.json says so."""
    found = _json(folder / RUN_FILE)
    return isinstance(found, dict) and {"memdlm", "options", "command"} <= set(found)


def is_checkpoint_name(name: str) -> bool:
    """Whether `name` is a name that runs give to checkpoints."""
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def foreign_in(path: Path) -> list[str]:
    """Return what in `path` no training run wrote; everything if it is no checkpoint, nothing if it is all ours."""
    if path.is_symlink() or not path.is_dir():
        return ["@"]
    is_ours = marked_as(path) == CHECKPOINT.name or _is_checkpoint(path)  # a damaged checkpoint is still ours
    return sorted(content(path) - written_in(path, CHECKPOINT)) or ([] if is_ours else ["/"])


def _is_checkpoint(path: Path) -> bool:
    state = _json(path / STATE)
    return isinstance(state, dict) and "global_step" in state


def _without_marker(path: Path) -> set[str]:
    """Return a checkpoint's own files in a folder without a marker, as transformers and earlier versions wrote."""
    return {name for name in content(path) if _OF_CHECKPOINT.fullmatch(name)} if _is_checkpoint(path) else set()


def _weights_without_marker(folder: Path) -> set[str]:
    """Return the weights that an earlier version left in the output folder of a run."""
    return {name for name in content(folder) if _WEIGHTS.fullmatch(name)} if is_run(folder) else set()


CHECKPOINT = Kind(name="checkpoint", words="a checkpoint", earlier=_without_marker)
FINAL = Kind(name="final weights", words="final weights", earlier=_weights_without_marker)
"""What a run leaves in its output folder at the end; the folder's marker lists only these files."""


def _is_result(path: Path) -> bool:
    if path.is_symlink():
        return False
    return marked_as(path) is not None if path.is_dir() else path.suffix == ".html" and path.is_file() and is_page(path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError):
        return None
