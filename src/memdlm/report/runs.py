"""Folders of runs -> numbers side by side: demos, lm-eval results, training runs and exposure-bias measurements.

What a folder holds is read off its files: `report.json`, `results_*.json` (lm-eval's), `trainer_state.json` (or the
last checkpoint's), `exposure_bias.json`.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memdlm.errors import DataError, MemDLMError
from memdlm.report.data import Row, check_report

CHANCE = "chance"
log = logging.getLogger(__name__)
_FILES = ("report.json", "results_*.json", "trainer_state.json", "exposure_bias.json")


@dataclass(kw_only=True, slots=True)
class Measured:
    """Everything that the runs say, in rows."""

    tasks: dict[str, Row] = field(default_factory=dict)
    """Per task that is measured by length: its `chance` and `train_length` (None: unknown)."""
    accuracy: list[Row] = field(default_factory=list)
    """`task`, `model`, `seed`, `memory`, `length`, `accuracy`, `questions`."""
    scores: list[Row] = field(default_factory=list)
    """`task`, `metric`, `model`, `seed`, `memory`, `value`, `stderr`, `documents`: what is not by length."""
    models: list[Row] = field(default_factory=list)
    """Training curves, as in a report; `options`, where a run.json says them, is how each was trained."""
    exposure_bias: list[Row] = field(default_factory=list)
    costs: list[Row] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    """`run`, `kind`, `command`, `settings`: where rows come from."""

    def part(self, **changes: Any) -> Row:
        """Return what figures and tables of a report read, with `changes`."""
        rows = [*self.models, *self.accuracy, *self.scores, *self.exposure_bias]
        seeds = sorted({row["seed"] for row in rows})
        return {"models": self.models, "accuracy": [], "exposure_bias": self.exposure_bias, "seeds": seeds, **changes}


def read_runs(folders: Sequence[Path]) -> Measured:
    """Read every folder; raises DataError for one without results, a damaged file, or a figure that two runs claim."""
    measured = Measured()
    names = labels(folders)
    demos = sum((folder / "report.json").is_file() for folder in folders)
    for folder, name in zip(folders, names, strict=True):
        if not folder.is_dir():
            raise DataError(f"run {str(folder)!r} is no folder.")
        before = len(measured.sources)
        try:
            _add_folder(measured, folder, name, prefix=f"{name}: " if demos > 1 else "")
        except MemDLMError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise DataError(
                f"run {str(folder)!r}: its results are damaged: {type(error).__name__} {error}. Write them again, or "
                "leave the run out."
            ) from error
        if len(measured.sources) == before:
            raise DataError(f"run {str(folder)!r} holds no results; looked for {', '.join(_FILES)}.")
    for rows, keys in (
        (measured.accuracy, ("task", "model", "seed", "memory", "length")),
        (measured.scores, ("task", "metric", "model", "seed", "memory")),
        (measured.models, ("model", "seed")),
        (measured.exposure_bias, ("model", "seed", "memory")),
    ):
        _once(rows, keys)
    return measured


def _add_folder(measured: Measured, folder: Path, name: str, prefix: str) -> None:
    if (folder / "report.json").is_file():
        _add_report(measured, folder / "report.json", name, prefix=prefix)
    _add_evaluations(measured, folder, name)
    state = _trainer_state(folder)
    if state is not None:
        _add_training(measured, state, name)
    if (folder / "exposure_bias.json").is_file():
        _add_bias(measured, folder / "exposure_bias.json", name)


def labels(folders: Sequence[Path]) -> list[str]:
    """Name runs by their folders, as shortly as tells them apart."""
    for depth in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise DataError("two of the runs are the same folder; name each once.")


def model_and_seed(name: str) -> tuple[str, int | None]:
    """Split a seed off the end of a model's folder name: "runs/mdlm-seed1" is model "mdlm", seed 1."""
    last = name.rstrip("/").rsplit("/", 1)[-1] if name.startswith((".", "/", "runs/")) else name
    match = re.fullmatch(r"(.+?)[-_/]seed[-_]?(\d+)", last)
    return (match[1], int(match[2])) if match else (last, None)


def curve_of(history: Iterable[Mapping[str, float]]) -> Row:
    """Turn a Trainer's log into a report's training curve."""
    entries = list(history)
    trained = [entry for entry in entries if "loss" in entry]
    judged = [entry for entry in entries if "eval_nll" in entry]
    return {
        "step": [entry["step"] for entry in trained],
        "loss": [entry["loss"] for entry in trained],
        "eval_step": [entry["step"] for entry in judged],
        "eval_nll": [entry["eval_nll"] for entry in judged],
        "eval_nll_memory": [entry["eval_nll_memory"] for entry in judged if "eval_nll_memory" in entry],
    }


def _read(path: Path) -> Row:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object.")
    return found


def _add_report(measured: Measured, path: Path, run: str, prefix: str) -> None:
    data = check_report(_read(path))
    task = data["task"]
    name = task["name"] if not prefix else f"{task['name']} ({run})"
    measured.tasks[name] = {
        "chance": task["chance"],
        "train_length": task["train_length"],
        "description": task["description"],
    }
    for row in data["accuracy"]:
        measured.accuracy.append({**row, "model": prefix + row["model"], "task": name})
    for kind in ("models", "exposure_bias"):
        getattr(measured, kind).extend({**row, "model": prefix + row["model"]} for row in data[kind])
    measured.sources.append(_source(run, "demo", data["command"], {"machine": data["machine"]}))


def _add_evaluations(measured: Measured, folder: Path, run: str) -> None:
    """Add what lm-eval wrote below `folder`; of an evaluation that was run again, the newest counts."""
    seen: dict[str, Path] = {}
    # lm-eval writes the date into the name.
    for path in sorted(folder.glob("**/results_*.json"), key=lambda path: path.name, reverse=True):
        data = _read(path)
        config = _part(data, "config", path)
        results = _part(data, "results", path)
        ours = config.get("memdlm") or {}
        settings = [config.get("model_args"), *(ours.get(each) for each in ("options", "generation", "memory"))]
        for task in list(results):
            key = json.dumps([task, config.get("model"), settings], sort_keys=True)
            newer = seen.setdefault(key, path)
            if newer is not path:
                log.warning("%s: %s was evaluated again with the same options; %s counts", path, task, newer)
                del results[task]
        if results:
            _add_results(measured, data, path, run)


def _part(data: Row, name: str, path: Path) -> Row:
    """Return an object of a results file; raises DataError where there is none."""
    part = data.get(name, {})
    if not isinstance(part, dict):
        raise DataError(f"{path}: {name!r} holds a {type(part).__name__}, not what lm-eval writes.")
    return part


def _add_results(measured: Measured, data: Row, path: Path, run: str) -> None:
    config = data.get("config", {})
    ours = config.get("memdlm", {})
    options = ours.get("options", {})
    arguments = config.get("model_args") or {}
    given = arguments.get("pretrained") if isinstance(arguments, Mapping) else None
    name = str(options.get("adapter") or options.get("pretrained") or given or config.get("model"))
    model, seed = model_and_seed(name)
    who = {
        "model": model,
        "seed": options.get("request_seed", 0) if seed is None else seed,
        "memory": bool(options.get("mem_enabled", False)),
    }
    groups = set(data.get("groups", {}))
    for task, results in data.get("results", {}).items():
        if task not in groups:
            count = data.get("n-samples", {}).get(task, {}).get("effective", 0)
            _add_task(measured, task, results, who, count)
    if "cost" in ours:
        tasks = sorted(set(data.get("results", {})) - groups)
        measured.costs.append({**who, "tasks": tasks, "processes": ours["processes"], **ours["cost"]})
    measured.sources.append(_source(run, f"evaluation of {name}", str(path), {**config, "task_seed": who["seed"]}))


def _add_task(measured: Measured, task: str, results: Row, who: Row, count: int) -> None:
    values = {
        key.split(",")[0]: (value, results.get(f"{key.split(',')[0]}_stderr,{key.split(',', 1)[1]}"))
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    by_length = [metric for metric in values if metric.isdigit() and values[metric][0] >= 0]
    if by_length:
        known = values.get(CHANCE, (None, None))[0]
        measured.tasks.setdefault(task, {"chance": known, "train_length": None, "description": ""})
    for metric, (value, error) in values.items():
        error = error if isinstance(error, int | float) else None
        if metric in by_length:
            share = {"accuracy": value, "questions": count // len(by_length)}
            measured.accuracy.append({"task": task, **who, "length": int(metric), **share})
        elif metric != CHANCE and not metric.isdigit():
            score = {"metric": metric, "value": value, "stderr": error, "documents": count}
            measured.scores.append({"task": task, **who, **score})


def _trainer_state(folder: Path) -> Path | None:
    if (folder / "trainer_state.json").is_file():
        return folder / "trainer_state.json"
    found = list(folder.glob("checkpoint-*/trainer_state.json"))
    return max(found, key=lambda path: int(path.parent.name.rsplit("-", 1)[1]), default=None)


def _add_training(measured: Measured, path: Path, run: str) -> None:
    data = _read(path)
    history = data.get("log_history", [])
    model, seed = model_and_seed(run)
    seconds = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    run_file = folder / "run.json"
    options = _read(run_file).get("options", {}) if run_file.is_file() else {}
    measured.models.append(
        {
            "model": model,
            "seed": seed or 0,
            "steps": data.get("global_step", 0),
            "seconds": seconds[-1] if seconds else None,
            "config": {},
            "options": options,
            "curve": curve_of(history),
        }
    )
    measured.sources.append(_source(run, "training", str(path), options))


def _add_bias(measured: Measured, path: Path, run: str) -> None:
    data = _read(path)
    for row in data["exposure_bias"]:
        model, seed = model_and_seed(row["model"])
        measured.exposure_bias.append({**row, "model": model, "seed": row["seed"] if seed is None else seed})
    settings = {name: data[name] for name in ("options", "memory", "conversations")}
    measured.sources.append(_source(run, "exposure bias", data["command"], settings))


def _source(run: str, kind: str, command: str, settings: Row) -> Row:
    return {"run": run, "kind": kind, "command": command, "settings": settings}


def _once(rows: Sequence[Row], keys: tuple[str, ...]) -> None:
    seen = set()
    for row in rows:
        key = tuple(row[each] for each in keys)
        if key in seen:
            same = ", ".join(f"{each} {row[each]!r}" for each in keys)
            raise DataError(f"two of the runs say something of {same}; leave one of them out.")
        seen.add(key)
