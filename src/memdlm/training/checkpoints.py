"""Checkpoints that are whole or absent, and which of them a run goes on from."""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from memdlm.errors import CheckpointError, ConfigError

STATE = "trainer_state.json"
SAVING = ".saving"
"""Folder, in output_dir, in which a checkpoint grows until it is whole."""
NEVER, LATEST = "never", "latest"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and re.search(r"-\d+$", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def prepare_output(folder: Path, resume: str, *, overwrite: bool, without: Collection[str] = ()) -> Path | None:
    """Return the checkpoint to go on from, or None to start anew.

    `resume` is `never`, `latest` (None where `folder` has no checkpoint yet) or a path. Starting anew beside the
    checkpoints of an earlier run would mix two runs, so `never` needs an output folder without any; `overwrite`
    deletes them. Raises ConfigError for that, and CheckpointError for a checkpoint that is missing or has no
    optimizer state.
    """
    found = checkpoints_in(folder)
    if resume == NEVER:
        if found and not overwrite:
            raise ConfigError(
                f"output_dir: {str(folder)!r} holds {found[-1].name} of an earlier run. Go on from it with --resume "
                "latest, delete its checkpoints with --overwrite_output_dir, or name another folder."
            )
        for path in found:
            shutil.rmtree(path)
        return None
    if resume == LATEST:
        return whole(found[-1], without) if found else None
    return whole(Path(resume), without)


def whole(path: Path, without: Collection[str] = ()) -> Path:
    """Return `path` if a run wrote it to go on from; raises CheckpointError when not.

    Its optimizer is not asked for when it is among the states that the run goes on `without`.
    """
    if not (path / STATE).is_file():
        raise CheckpointError(f"resume: {str(path)!r} is no checkpoint of a training run (it has no {STATE}).")
    # By launcher: plain and FSDP with a full state, FSDP with shards, DeepSpeed.
    kinds = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
    others = ("scheduler.pt", "rng_state*.pth")
    if "optimizer" not in without and not any(next(path.glob(kind), None) for kind in (*kinds, *others)):
        raise CheckpointError(
            f"resume: {str(path)!r} was saved with save_only_model=True: optimizer, schedule and random state are not "
            "there, so the run would silently be another one. To start anew from its weights, name it as the model."
        )
    return path


def publish(finished: Path, target: Path) -> None:
    """Move a whole checkpoint to its place; one that is there is replaced."""
    earlier = target.with_name(f".{target.name}.old")
    shutil.rmtree(earlier, ignore_errors=True)
    if target.exists():
        os.replace(target, earlier)
    os.replace(finished, target)
    shutil.rmtree(earlier, ignore_errors=True)


def move_files(source: Path, target: Path) -> None:
    """Move the files of a folder into another, each at once, and remove the folder; weights come first."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: not path.name.endswith(".safetensors")):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)
    source.rmdir()
