"""Checkpoints that are complete or absent, and the choice of the one that a run resumes from."""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from memdlm.errors import CheckpointError, ConfigError, MachineError
from memdlm.files import flush, resolved, writing
from memdlm.outputs import content, discard, mark, remove, written_in
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
"""Folder in output_dir in which a checkpoint is written until it is complete."""
NEVER, LATEST = "never", "latest"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and re.search(r"-\d+$", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def prepare_output(folder: Path, resume: str, *, overwrite: bool, without: Collection[str] = ()) -> Path | None:
    """Return the checkpoint to resume from, or None to start anew.

    `resume` is `never`, `latest` (which gives None where `folder` has no checkpoint yet) or a path. A new run beside
    the checkpoints of an earlier one would mix two runs, so `never` needs a folder without checkpoints; `overwrite`
    deletes them. Raises ConfigError when there are checkpoints in the way, and when `folder` holds anything that no
    run of memdlm wrote (it is left as it is). Raises CheckpointError for a checkpoint that is missing or has no
    optimizer state.
    """
    restore(folder)
    if resume not in (NEVER, LATEST):
        restore(Path(resume).absolute().parent)
    refuse_others(folder, goes_on=resume != NEVER)
    found = checkpoints_in(folder)
    if resume == NEVER:
        if found and not overwrite:
            raise ConfigError(
                f"output_dir: {str(folder)!r} holds {found[-1].name} of an earlier run. Continue from it with --resume "
                "latest, delete its checkpoints with --overwrite_output_dir, or name another folder."
            )
        for path in found:
            discard(path, CHECKPOINT)
        return None
    if resume == LATEST:
        return whole(found[-1], without) if found else None
    return whole(Path(resume), without)


def whole(path: Path, without: Collection[str] = ()) -> Path:
    """Return `path` if it is a checkpoint that a run can resume from; raises CheckpointError if not.

    No optimizer state is needed when it is one of the states that the run resumes `without`.
    """
    if not (path / STATE).is_file():
        raise CheckpointError(f"resume: {str(path)!r} is no checkpoint of a training run (it has no {STATE}).")
    # By launcher: plain, FSDP with a full state, FSDP with shards, DeepSpeed.
    kinds = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
    others = ("scheduler.pt", "rng_state*.pth")
    if "optimizer" not in without and not any(next(path.glob(kind), None) for kind in (*kinds, *others)):
        inside = checkpoints_in(path)
        if inside:
            raise CheckpointError(
                f"resume: {str(path)!r} is the output folder of a run, not a checkpoint. Name {str(inside[-1])!r}, or "
                "resume with latest and that output_dir."
            )
        raise CheckpointError(
            f"resume: {str(path)!r} was saved with save_only_model=True: it has no optimizer, schedule and random "
            "state, so the resumed run would silently differ. To start anew from its weights, name it as the model."
        )
    return path


def restore(folder: Path) -> None:
    """Put back checkpoints whose replacement was interrupted."""
    for earlier in folder.glob(".checkpoint-*.old") if folder.is_dir() else ():
        target = folder / earlier.name[1:].removesuffix(".old")
        if is_checkpoint_name(target.name) and not os.path.lexists(target) and not foreign_in(earlier):
            os.replace(earlier, target)


def publish(finished: Path, target: Path) -> None:
    """Move a complete checkpoint to its place, and replace an earlier one there.

    Raises ConfigError when the place holds something else; the new checkpoint then stays where it is.
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
    """Delete the oldest checkpoints beyond `limit`; the newest, the `best` and foreign files are kept."""
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
    """Move the files of `source` into `target`, each atomically and weights first, and remove `source`.

    What an earlier run saved there and this one did not is deleted first: an adapter or a learned memory of that run
    would be read with these weights. Raises ConfigError when memdlm did not write a file in `target` of the same name,
    and MachineError when one of an earlier run cannot be deleted: all files then stay in `source`.
    """
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        flush(source)
        known, new = written_in(target, FINAL), content(source)
        for path in source.iterdir():
            place = target / path.name
            if os.path.lexists(place) and not (is_run(target) or {path.name, f"{path.name}/"} & known):
                raise ConfigError(
                    f"{place} exists and memdlm did not write it; it replaces only what it made itself. The files to "
                    f"be saved are in {source}."
                )
        mark(target, FINAL, known | new)
        stale = known - new
        remove(target, stale)
        left = sorted(name for name in stale if os.path.isfile(target / name))
        if left:
            raise MachineError(
                f"{target / left[0]} is of an earlier run and could not be deleted; it would be loaded with the new "
                f"weights, which are in {source}. Delete it, and move them here."
            )
        for path in sorted(source.iterdir(), key=lambda path: not path.name.endswith(".safetensors")):
            if path.is_dir() and (target / path.name).is_dir():
                shutil.rmtree(target / path.name)
            os.replace(path, target / path.name)
        mark(target, FINAL, new)
        source.rmdir()
