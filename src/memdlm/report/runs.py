"""Read the results of runs: demos, lm-eval results, training runs and exposure-bias measurements.

A folder's files show what it holds: `report.json`, `results_*.json` (lm-eval's), `trainer_state.json` (or the
last checkpoint's), `exposure_bias.json`.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

from memdlm.errors import DataError, MemDLMError
from memdlm.report.model import Accuracy, Bias, Curve, Part, Task, check_report
from memdlm.report.records import plain, read
from memdlm.report.tables import bias_part

CHANCE = "chance"
Json: TypeAlias = dict[str, Any]
log = logging.getLogger(__name__)
USED = (
    *("requests", "seconds", "tokens_per_second", "forward_passes", "written_tokens"),
    *("write_ms_per_token", "peak_memory_bytes"),
)
"""The entries of an evaluation's ledger that are shown."""
_FILES = ("report.json", "results_*.json", "trainer_state.json", "exposure_bias.json")


@dataclass(frozen=True, kw_only=True)
class TaskAccuracy(Accuracy):
    """Accuracy of one of several tasks."""

    task: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of an evaluation that is not by length."""

    task: str
    metric: str
    model: str
    seed: int
    memory: bool
    value: float
    stderr: float | None
    documents: int


@dataclass(frozen=True, kw_only=True)
class Logged:
    """What a training run logged: losses as (step, nats per token), and its totals, None if unknown."""

    without: tuple[tuple[float, float], ...] = ()
    """Training loss without memory."""
    memory: tuple[tuple[float, float], ...] = ()
    """Training loss with the memory that training writes."""
    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run; `options` are from its run.json, empty if there is none."""

    model: str
    seed: int
    curve: Curve
    logged: Logged
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of an evaluation; `used` holds entries of its ledger."""

    model: str
    memory: bool
    tasks: Sequence[str]
    processes: int
    used: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from."""

    run: str
    kind: str
    command: str
    settings: Mapping[str, Any]


@dataclass(kw_only=True, slots=True)
class Measured:
    """The results of all runs, in rows."""

    tasks: dict[str, Task] = field(default_factory=dict)
    """The tasks that are measured by length."""
    accuracy: list[TaskAccuracy] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    models: list[Training] = field(default_factory=list)
    exposure_bias: list[Bias] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def part(self) -> Part:
        """Return training and exposure bias in the form that figures and tables read."""
        rows: list[Any] = [*self.models, *self.accuracy, *self.scores, *self.exposure_bias]
        seeds = sorted({row.seed for row in rows})
        return replace(bias_part(self.exposure_bias, seeds), models=tuple(self.models))


def read_runs(folders: Sequence[Path]) -> Measured:
    """Read every folder; raises DataError for one without results, a damaged file, or a result given by two runs."""
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
    """Name runs by the ends of their paths, as short as is unambiguous."""
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


def curve_of(history: Iterable[Mapping[str, Any]]) -> Curve:
    """Turn a Trainer's log into a report's training curve."""
    entries = list(history)
    trained = [entry for entry in entries if "loss" in entry]
    judged = [entry for entry in entries if "eval_nll" in entry]
    return Curve(
        step=tuple(entry["step"] for entry in trained),
        loss=tuple(entry["loss"] for entry in trained),
        eval_step=tuple(entry["step"] for entry in judged),
        eval_nll=tuple(entry["eval_nll"] for entry in judged),
        eval_nll_memory=tuple(entry["eval_nll_memory"] for entry in judged if "eval_nll_memory" in entry),
    )


def logged_of(history: Iterable[Mapping[str, Any]], *, remembers: bool) -> Logged:
    """Read the losses of a Trainer's log. A log that has `loss` alone counts as with memory if training `remembers`."""
    entries = list(history)

    def points(name: str) -> tuple[tuple[float, float], ...]:
        found = [(entry["step"], entry[name]) for entry in entries if name in entry]
        return tuple((step, value) for step, value in found if math.isfinite(value))

    without, memory = points("nll"), points("nll_memory")
    if not without and not memory:
        without, memory = ((), points("loss")) if remembers else (points("loss"), ())
    return Logged(
        without=without,
        memory=memory,
        steps=max((entry["step"] for entry in entries if "step" in entry), default=None),
        seconds=next((entry["train_runtime"] for entry in entries if "train_runtime" in entry), None),
    )


def _read(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object.")
    return found


def _add_report(measured: Measured, path: Path, run: str, prefix: str) -> None:
    found = check_report(_read(path))
    name = f"{found.task.name} ({run})" if prefix else found.task.name
    measured.tasks[name] = found.task
    for row in found.accuracy:
        told = {"length": row.length, "accuracy": row.accuracy, "questions": row.questions}
        who: Json = {"model": prefix + row.model, "seed": row.seed, "memory": row.memory, **told}
        measured.accuracy.append(TaskAccuracy(task=name, **who))
    for each in found.models:
        losses = [{"step": step, "loss": loss} for step, loss in zip(each.curve.step, each.curve.loss, strict=True)]
        totals = {"step": each.steps, "train_runtime": each.seconds}
        logged = logged_of([*losses, totals], remembers="memory" in each.config)
        measured.models.append(
            Training(model=prefix + each.model, seed=each.seed, curve=each.curve, logged=logged, config=each.config)
        )
    measured.exposure_bias += [replace(row, model=prefix + row.model) for row in found.exposure_bias]
    machine = {"machine": plain(found.machine)}
    measured.sources.append(Source(run=run, kind="demo", command=found.command, settings=machine))


def _add_evaluations(measured: Measured, folder: Path, run: str) -> None:
    """Add what lm-eval wrote in `folder`; of repeated evaluations, only the newest counts."""
    seen: dict[str, Path] = {}
    # The date in lm-eval's file names gives the order.
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


def _part(data: Json, name: str, path: Path) -> Json:
    """Return an object of a results file, {} if it is missing; raises DataError for any other type."""
    part = data.get(name, {})
    if not isinstance(part, dict):
        raise DataError(f"{path}: {name!r} holds a {type(part).__name__}, not what lm-eval writes.")
    return part


def _add_results(measured: Measured, data: Json, path: Path, run: str) -> None:
    config = data.get("config", {})
    ours = config.get("memdlm", {})
    options = ours.get("options", {})
    arguments = config.get("model_args") or {}
    given = arguments.get("pretrained") if isinstance(arguments, Mapping) else None
    name = str(options.get("adapter") or options.get("pretrained") or given or config.get("model"))
    model, seed = model_and_seed(name)
    who: Json = {
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
        used = {each: ours["cost"][each] for each in USED}
        cost = Cost(model=model, memory=who["memory"], tasks=tasks, processes=ours["processes"], used=used)
        measured.costs.append(cost)
    settings = {**config, "task_seed": who["seed"]}
    measured.sources.append(Source(run=run, kind=f"evaluation of {name}", command=str(path), settings=settings))


def _add_task(measured: Measured, task: str, results: Json, who: Json, count: int) -> None:
    values = {
        key.split(",")[0]: (value, results.get(f"{key.split(',')[0]}_stderr,{key.split(',', 1)[1]}"))
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    by_length = [metric for metric in values if metric.isdigit() and values[metric][0] >= 0]
    if by_length:
        known = values.get(CHANCE, (None, None))[0]
        about = Task(name=task, description="", chance=known, train_length=None, lengths=(), num_questions=0)
        measured.tasks.setdefault(task, about)
    for metric, (value, error) in values.items():
        error = error if isinstance(error, int | float) else None
        if metric in by_length:
            questions = count // len(by_length)
            row = TaskAccuracy(task=task, length=int(metric), accuracy=value, questions=questions, **who)
            measured.accuracy.append(row)
        elif metric != CHANCE and not metric.isdigit():
            score = Score(task=task, metric=metric, value=value, stderr=error, documents=count, **who)
            measured.scores.append(score)


def _trainer_state(folder: Path) -> Path | None:
    if (folder / "trainer_state.json").is_file():
        return folder / "trainer_state.json"
    found = list(folder.glob("checkpoint-*/trainer_state.json"))
    return max(found, key=lambda path: int(path.parent.name.rsplit("-", 1)[1]), default=None)


def _add_training(measured: Measured, path: Path, run: str) -> None:
    data = _read(path)
    history = data.get("log_history", [])
    model, seed = model_and_seed(run)
    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    run_file = folder / "run.json"
    options = _read(run_file).get("options", {}) if run_file.is_file() else {}
    logged = logged_of(history, remembers=bool(options.get("mem_enabled", False)))
    measured.models.append(
        Training(model=model, seed=seed or 0, curve=curve_of(history), logged=logged, options=options)
    )
    measured.sources.append(Source(run=run, kind="training", command=str(path), settings=options))


def _add_bias(measured: Measured, path: Path, run: str) -> None:
    data = _read(path)
    for index, told in enumerate(data["exposure_bias"]):
        row = read(Bias, told, f"{path}: exposure_bias[{index}]")
        model, seed = model_and_seed(row.model)
        measured.exposure_bias.append(replace(row, model=model, seed=row.seed if seed is None else seed))
    settings = {name: data[name] for name in ("options", "memory", "conversations")}
    measured.sources.append(Source(run=run, kind="exposure bias", command=data["command"], settings=settings))


def _once(rows: Sequence[Any], keys: tuple[str, ...]) -> None:
    seen = set()
    for row in rows:
        key = attrgetter(*keys)(row)
        if key in seen:
            same = ", ".join(f"{name} {value!r}" for name, value in zip(keys, key, strict=True))
            raise DataError(f"two of the runs have a result for {same}; leave one of them out.")
        seen.add(key)
