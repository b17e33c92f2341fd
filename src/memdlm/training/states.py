"""What a checkpoint holds besides weights: the run's position, and the states of optimizer, schedule and others."""

import dataclasses
import json
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from memdlm.errors import CheckpointError, ConfigError, MemDLMError, unknown
from memdlm.models.hub.loading import MEMORY_CONFIG_FILE, MEMORY_FILE
from memdlm.training.arguments import TrainingArguments
from memdlm.training.checkpoints import STATE

OPTIMIZER, SCHEDULER, RNG, SCALER, MEMORY = "optimizer", "scheduler", "rng", "scaler", "memory"
PARTS = (OPTIMIZER, SCHEDULER, RNG, SCALER, MEMORY)
"""What `resume_without` can name: the optimizer, the learning-rate schedule, the random state, the scale of fp16
gradients, and the memory's learned parameters."""
SHARDED = ("optimizer.bin", "optimizer_*", "global_step*")
"""An optimizer's files as FSDP and DeepSpeed write them; those libraries read them strictly."""
RNG_KEYS = ("python", "numpy", "cpu")
COUNTS = ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen")
NUMBERS = ("epoch", "total_flos", "logging_steps", "eval_steps", "save_steps")
OPTIONAL = {"train_batch_size": int, "best_global_step": int, "best_metric": float, "best_model_checkpoint": str}


def parts_of(arguments: TrainingArguments) -> tuple[str, ...]:
    """Return the names of the states that a run with these arguments has."""
    parts = [OPTIMIZER, SCHEDULER, RNG]
    if arguments.fp16 and not arguments.deepspeed:
        parts.append(SCALER)
    if arguments.memory is not None and arguments.memory.is_learned:
        parts.append(MEMORY)
    return tuple(parts)


def left_out(words: str | None, arguments: TrainingArguments) -> frozenset[str]:
    """Read `resume_without`; raises ConfigError for an unknown state, or one that this run does not have."""
    names = [word.strip() for word in (words or "").split(",") if word.strip()]
    for name in names:
        if name not in PARTS:
            raise ConfigError(unknown("resume_without:", name, PARTS))
        if name not in parts_of(arguments):
            raise ConfigError(f"resume_without={name!r} has no effect: this run has no such state. Leave it out.")
    return frozenset(names)


def check_checkpoint(
    path: Path, arguments: TrainingArguments, without: Collection[str] = (), *, needs_scaler: bool | None = None
) -> None:
    """Raise CheckpointError unless the files of `path`, beside its weights, are all there and can be read.

    States in `without` are not checked. Large states are mapped, not read.
    """
    state = read_position(path)
    parts = [part for part in parts_of(arguments) if part not in without]
    if needs_scaler is False and SCALER in parts:
        parts.remove(SCALER)
    found = {part: files_of(path, part, arguments) for part in parts}
    missing = [part for part in parts if not all(file.exists() for file in found[part])]
    if missing:
        names = ", ".join(file.name for part in missing for file in found[part] if not file.exists())
        raise CheckpointError(
            f"resume: {str(path)!r} lacks {names}, so the resumed run would silently differ. Resume from another "
            f"checkpoint, name it as the model to start anew from its weights, or add --resume_without "
            f"{','.join(missing)} to resume without it."
        )
    for part in parts:
        for file in found[part]:
            if file.suffix in (".pt", ".pth"):
                _check_shape(part, file, read_state(file, part, mmap=part == OPTIMIZER))
    best = state["best_model_checkpoint"] if arguments.load_best_model_at_end else None
    if best is not None and best_of(path, best) is None:
        raise CheckpointError(
            f"resume: {path / STATE} names {best} as the best checkpoint so far, but it is missing. Put it back, or "
            "leave load_best_model_at_end off."
        )


def best_of(path: Path, recorded: str) -> Path | None:
    """Return the best checkpoint, `recorded` by checkpoint `path`; the folder of both may have been moved."""
    places = (Path(recorded), path.absolute().parent / Path(recorded).name)
    return next((place for place in places if place.is_dir()), None)


def files_of(path: Path, part: str, arguments: TrainingArguments) -> list[Path]:
    """Return the files that should hold the state `part` in checkpoint `path`."""
    if part == MEMORY:
        return [path / MEMORY_FILE, path / MEMORY_CONFIG_FILE]
    if part == RNG:
        return _rng_files(path, arguments)
    if part == OPTIMIZER and not (path / "optimizer.pt").exists():
        sharded = [file for pattern in SHARDED for file in sorted(path.glob(pattern))]
        return sharded or [path / "optimizer.pt"]
    if part == SCHEDULER and any(path.glob("global_step*")) and not (path / "scheduler.pt").exists():
        return []  # DeepSpeed keeps its schedule with its other states
    return [path / f"{part}.pt"]


def _rng_files(path: Path, arguments: TrainingArguments) -> list[Path]:
    """Return this process's file; none if the checkpoint is complete for another number of processes.

    A run may be resumed on another number of processes only if nothing draws from that state: see `is_same_step`.
    """
    one, world = path / "rng_state.pth", arguments.world_size
    own = one if world == 1 else path / f"rng_state_{arguments.process_index}.pth"
    several = {file.name for file in path.glob("rng_state_*.pth")}
    others = len(several) > 1 and several == {f"rng_state_{rank}.pth" for rank in range(len(several))}
    if not own.exists() and ((others and len(several) != world) or (world > 1 and one.exists())):
        return []
    return [own]


def read_state(path: Path, part: str, *, mmap: bool = False, device: Any = "cpu") -> Any:
    """Return the content of a `torch.save` file: tensors and plain values only, no code is run.

    Unless the file is mapped, its checksums are compared; torch writes them but does not compare them.
    """
    with readable(path, part), safe_globals():
        if not mmap and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise ValueError(f"{broken} is damaged")
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


@contextmanager
def readable(path: Path, part: str) -> Iterator[None]:
    """Turn the exceptions that a damaged file of state `part` causes into CheckpointError."""
    try:
        yield
    except MemDLMError:
        raise
    # Unpickling damaged bytes can raise any of these.
    except (
        *(OSError, EOFError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError),
        *(AssertionError, ImportError, MemoryError, pickle.PickleError, zipfile.BadZipFile, zlib.error),
    ) as error:
        words = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"resume: {path} could not be read ({type(error).__name__}: {words}). Resume from another checkpoint, name "
            f"this one as the model to start anew from its weights, or add --resume_without {part}."
        ) from error


def _check_shape(part: str, path: Path, state: Any) -> None:
    keys = {OPTIMIZER: ("state", "param_groups"), RNG: RNG_KEYS}.get(part, ())
    with readable(path, part):
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        for key in keys:
            if key not in state:
                raise KeyError(key)


def read_position(path: Path) -> dict[str, Any]:
    """Return what trainer_state.json holds; raises CheckpointError when a run cannot resume from there.

    An impossible step or epoch would make a run skip batches for ever, or end at once.
    """
    file = path / STATE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        usual = {field.name: field.default for field in dataclasses.fields(TrainerState)}
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        if strange := sorted(set(found) - set(usual)):
            raise ValueError(f"{strange[0]} is not known")
        _check_position({**usual, **found}, path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"resume: {file} is damaged: {error}. Resume from another checkpoint, or name this one as the model to "
            "start anew from its weights."
        ) from error
    return {**usual, **found}


def _check_position(state: Mapping[str, Any], path: Path) -> None:
    for name in COUNTS:
        _expect(name, state[name], isinstance(state[name], int) and not isinstance(state[name], bool))
    for name in (*COUNTS, *NUMBERS):
        value = state[name]
        _expect(name, value, _is_number(value) and value >= 0)
    for name, kind in OPTIONAL.items():
        value = state[name]
        _expect(name, value, value is None or (_is_number(value) if kind is float else type(value) is kind))
    entries = state["log_history"]
    _expect("log_history", type(entries), isinstance(entries, list) and all(isinstance(each, dict) for each in entries))
    callbacks = state["stateful_callbacks"]
    _expect("stateful_callbacks", type(callbacks), callbacks is None or isinstance(callbacks, dict))
    step, named = state["global_step"], re.fullmatch(r"checkpoint-(\d+)", path.name)
    _expect("global_step", step, named is None or step == int(named[1]))
    # transformers itself takes one more step when a finished run is resumed.
    for name, most, more in ("global_step", "max_steps", 1), ("epoch", "num_train_epochs", 0):
        if state[most] and state[name] > state[most] + more:
            raise ValueError(f"{name} is {state[name]!r}, more than {most}={state[most]!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _expect(name: str, value: Any, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}")
