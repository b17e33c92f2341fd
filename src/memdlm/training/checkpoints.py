"""Checkpoints that are whole or absent, and which of them a run goes on from."""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from memdlm.errors import CheckpointError, ConfigError
from memdlm.files import flush, resolved, writing
from memdlm.outputs import content, discard, mark, written_in
from memdlm.training.output_dir import (
    CHECKPOINT,
    FINAL,
    STATE,
    foreign_in,
    is_checkpoint_name,
    is_run,
    refusal,
    refuse_others,
)

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
    deletes them. Raises ConfigError for that, and when `folder` holds anything that no run of memdlm wrote, which is
    left as it is; CheckpointError for a checkpoint that is missing or has no optimizer state.
    """
    restore(folder)
    if resume not in (NEVER, LATEST):
        restore(Path(resume).absolute().parent)
    refuse_others(folder, goes_on=resume != NEVER)
    found = checkpoints_in(folder)
    if resume == NEVER:
        if found and not overwrite:
            raise ConfigError(
                f"output_dir: {str(folder)!r} holds {found[-1].name} of an earlier run. Go on from it with --resume "
                "latest, delete its checkpoints with --overwrite_output_dir, or name another folder."
            )
        for path in found:
            discard(path, CHECKPOINT)
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


def restore(folder: Path) -> None:
    """Put back checkpoints whose replacement was cut off."""
    for earlier in folder.glob(".checkpoint-*.old") if folder.is_dir() else ():
        target = folder / earlier.name[1:].removesuffix(".old")
        if is_checkpoint_name(target.name) and not os.path.lexists(target) and not foreign_in(earlier):
            os.replace(earlier, target)


def publish(finished: Path, target: Path) -> None:
    """Move a whole checkpoint to its place; one that is there is replaced.

    Raises ConfigError when something else is there: the new one then stays where it is.
    """
    mark(finished, CHECKPOINT)
    flush(finished)
    earlier = target.with_name(f".{target.name}.old")
    if os.path.lexists(target):
        foreign = foreign_in(target)
        if foreign:
            raise ConfigError(f"{refusal(target, foreign[0])} The new checkpoint is in {finished}.")
        if earlier.is_dir():
            discard(earlier, CHECKPOINT)
        os.replace(target, earlier)
    os.replace(finished, target)
    if earlier.is_dir():
        discard(earlier, CHECKPOINT)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but not the newest, the `best`, or files of others."""
    found = checkpoints_in(folder)
    if limit is None or limit <= 0:
        return
    kept = {found[-1].name} if found else set()
    if best is not None and resolved(best).parent == resolved(folder):
        kept.add(Path(best).name)
    others = [path for path in found if path.name not in kept]
    for path in others[: max(0, len(found) - max(limit, len(kept)))]:
        discard(path, CHECKPOINT)


def move_files(source: Path, target: Path) -> None:
    """Move the files of a folder into another, each at once, and remove the folder; weights come first.

    Raises ConfigError when `target` has one of them from somebody else: all stay in `source` then.
    """
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        flush(source)
        known, new = written_in(target, FINAL), content(source)
        for path in source.iterdir():
            place = target / path.name
            if os.path.lexists(place) and not (is_run(target) or {path.name, f"{path.name}/"} & known):
                raise ConfigError(
                    f"{place} exists and memdlm did not write it; it replaces only what it made itself. What was to be "
                    f"saved is in {source}."
                )
        mark(target, FINAL, known | new)
        for path in sorted(source.iterdir(), key=lambda path: not path.name.endswith(".safetensors")):
            if path.is_dir() and (target / path.name).is_dir():
                shutil.rmtree(target / path.name)
            os.replace(path, target / path.name)
        source.rmdir()
