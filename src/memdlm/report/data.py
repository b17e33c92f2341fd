"""The numbers of a report: its shape is checked here, and each table is computed here once, for all readers.

The rule of honest reporting lives here too: a result with inference-time memory counts only beside the result
of the same model, seed and length without memory. One that stands alone is refused (`with_baseline`).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from memdlm.errors import DataError

Report: TypeAlias = Mapping[str, Any]
"""What `memdlm demo` measured, in JSON types."""
Row: TypeAlias = dict[str, Any]

_ANY_OTHER_KEY = "*"
_TASK: dict[str, Any] = {
    "name": str,
    "description": str,
    "chance": float,
    "train_length": int,
    "lengths": [int],
    "num_questions": int,
}
_ACCURACY: list[dict[str, Any]] = [
    {"model": str, "seed": int, "memory": bool, "length": int, "accuracy": float, "questions": int}
]
_RECALL: dict[str, Any] = {
    "task": _TASK,
    "floor": float,
    "leak": [str],
    "seeds": [int],
    "models": [
        {
            "model": str,
            "seed": int,
            "parameters": int,
            "steps": int,
            "seconds": float,
            "config": {},
            "curve": {"step": [int], "loss": [float], "nll": [float], "nll_memory": [float]},
        }
    ],
    "accuracy": _ACCURACY,
    "exposure_bias": [],
}
"""The part that `memdlm demo` measures first: recall from memory alone. Reports of earlier versions have none."""
_WRITTEN: dict[str, Any] = {"words": [str], "before": [float], "after": [float], "is_value": [bool]}
_PARALLEL_BIAS = ("static", "sequential", "matched")
_SHAPE: dict[str, Any] = {
    "title": str,
    "version": str,
    "date": str,
    "command": str,
    "seeds": [int],
    "quick": bool,
    "notes": [str],
    "machine": {"cores": int, "torch": str, "python": str},
    "seconds": {"total": float, _ANY_OTHER_KEY: float},
    "task": _TASK,
    "models": [
        {
            "model": str,
            "seed": int,
            "parameters": int,
            "steps": int,
            "seconds": float,
            "config": {},
            "curve": {
                "step": [int],
                "loss": [float],
                "eval_step": [int],
                "eval_nll": [float],
                "eval_nll_memory": [float],
            },
        }
    ],
    "accuracy": _ACCURACY,
    "exposure_bias": [
        {
            "model": str,
            "seed": int,
            "memory": bool,
            "step": [int],
            "static": [float],
            "sequential": [float],
            "matched": [float],
        }
    ],
}
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def check_report(report: Report) -> Row:
    """Return a plain copy of `report` whose every field is there and of its kind; lists may be empty.

    Anything else is a DataError that names the field. Fields this module does not know are kept as they are.
    """
    data: Row = _plain(report, "report")
    _match(data, _SHAPE, "report")
    _check_accuracy(data, "report")
    if "recall" in data:
        _check_recall(data["recall"], "report.recall")
    for index, row in enumerate(data["models"]):
        curve, field = row["curve"], f"report.models[{index}].curve"
        _same_length(curve, "step", ("loss",), field)
        with_memory = ("eval_nll_memory",) if curve["eval_nll_memory"] else ()
        _same_length(curve, "eval_step", ("eval_nll", *with_memory), field)
    for index, row in enumerate(data["exposure_bias"]):
        _same_length(row, "step", _PARALLEL_BIAS, f"report.exposure_bias[{index}]")
    _once_each(data, "models", ("model", "seed"))
    _once_each(data, "exposure_bias", ("model", "seed", "memory"))
    return data


def _check_accuracy(data: Row, field: str) -> None:
    _in_range(data["task"]["chance"], f"{field}.task.chance", most=1)
    _in_range(data["task"]["train_length"], f"{field}.task.train_length", least=1)
    for index, length in enumerate(data["task"]["lengths"]):
        _in_range(length, f"{field}.task.lengths[{index}]", least=1)
    for index, row in enumerate(data["accuracy"]):
        _in_range(row["accuracy"], f"{field}.accuracy[{index}].accuracy", most=1)
        _in_range(row["length"], f"{field}.accuracy[{index}].length", least=1)
    _once_each(data, "accuracy", ("model", "seed", "memory", "length"), field)


def _check_recall(data: Row, field: str) -> None:
    _match(data, _RECALL, field)
    _check_accuracy(data, field)
    for index, row in enumerate(data["models"]):
        curve, inner = row["curve"], f"{field}.models[{index}]"
        with_memory = ("nll_memory",) if curve["nll_memory"] else ()
        _same_length(curve, "step", ("loss", "nll", *with_memory), f"{inner}.curve")
        if "written" in row:
            _match(row["written"], _WRITTEN, f"{inner}.written")
            _same_length(row["written"], "words", ("before", "after", "is_value"), f"{inner}.written")
    _once_each(data, "models", ("model", "seed"), field)


def _plain(value: Any, field: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise DataError(f"{field} has the key {key!r}: JSON keys are texts.")
        return {key: _plain(inner, f"{field}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{field}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{field} is {value}: a report holds finite numbers only. Leave out what diverged.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DataError(f"{field} is of type {type(value).__name__}, which JSON does not have. Convert it first.")


def _match(value: Any, shape: Any, field: str) -> None:
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise DataError(f"{field} must be an object, got {value!r}.")
        for key in shape.keys() - {_ANY_OTHER_KEY}:
            if key not in value:
                raise DataError(f"{field}.{key} is missing. {field} has: {', '.join(sorted(value))}.")
        for key, inner in value.items():
            expected = shape.get(key, shape.get(_ANY_OTHER_KEY))
            if expected is not None:
                _match(inner, expected, f"{field}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise DataError(f"{field} must be a list, got {value!r}.")
        for index, inner in enumerate(value):
            _match(inner, shape[0], f"{field}[{index}]")
    else:
        possible = (int, float) if shape is float else shape
        if not isinstance(value, possible) or (isinstance(value, bool) and shape is not bool):
            raise DataError(f"{field} must be {_WORDS[shape]}, got {value!r}.")


def _in_range(value: float, field: str, *, least: float = 0, most: float = math.inf) -> None:
    if not least <= value <= most:
        limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise DataError(f"{field} must be {limits}, got {value}.")


def _same_length(row: Row, steps: str, others: Iterable[str], field: str) -> None:
    for other in others:
        if len(row[other]) != len(row[steps]):
            raise DataError(
                f"{field}.{other} has {len(row[other])} values for the {len(row[steps])} of {field}.{steps}."
            )


def _once_each(data: Row, name: str, keys: tuple[str, ...], field: str = "report") -> None:
    seen: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(data[name]):
        first = seen.setdefault(tuple(row[key] for key in keys), index)
        if first != index:
            same = ", ".join(f"{key} {row[key]!r}" for key in keys)
            raise DataError(f"{field}.{name}[{index}] repeats {field}.{name}[{first}]: {same}.")


def model_names(data: Report) -> list[str]:
    """Every model of the report, in the order in which it first appears."""
    rows = [*data["models"], *data["accuracy"], *data["exposure_bias"]]
    return list(dict.fromkeys(row["model"] for row in rows))


def with_baseline(rows: Sequence[Row], *keys: str) -> tuple[list[Row], list[Row]]:
    """Split into the rows that may be compared and the refused ones.

    Refused is a row with memory for which no row without memory agrees in all `keys`.
    """
    baselines = {tuple(row[key] for key in keys) for row in rows if not row["memory"]}
    kept: list[Row] = []
    refused: list[Row] = []
    for row in rows:
        has_baseline = tuple(row[key] for key in keys) in baselines
        (kept if has_baseline else refused).append(row)
    return kept, refused


def spread(values: Sequence[float]) -> float | None:
    """How far seeds lie apart: half the range of two, the standard deviation (n - 1) of three or more."""
    if len(values) < 2:
        return None
    return abs(values[0] - values[1]) / 2 if len(values) == 2 else statistics.stdev(values)


def summary_rows(report: Report) -> list[Row]:
    """The accuracy table as data: per model, first memory off, then on, one cell per length, ascending.

    A row has `model`, `memory` and `cells`; a cell has `length`, `mean`, `spread` (None for a single seed),
    `values` and `seeds` (ascending by seed), all accuracies in 0..1, and `note`: empty, or what is missing.
    A cell that must not be compared has no mean and the note "no baseline". Without any accuracy: no rows.
    """
    return accuracy_rows(check_report(report))


def accuracy_rows(data: Report) -> list[Row]:
    """The same of a checked report, or of one's parts: `accuracy`, `models`, `exposure_bias`, `seeds` and `task`."""
    if not data["accuracy"]:
        return []
    kept, refused = with_baseline(data["accuracy"], "model", "seed", "length")
    lengths = sorted({*data["task"]["lengths"], *(row["length"] for row in data["accuracy"])})
    num_seeds = len(set(data["seeds"]))

    def cell(model: str, memory: bool, length: int) -> Row:
        key = (model, memory, length)
        mine = sorted((row for row in kept if _cell_key(row) == key), key=lambda row: row["seed"])
        alone = sorted(row["seed"] for row in refused if _cell_key(row) == key)
        values = [row["accuracy"] for row in mine]
        return {
            "length": length,
            "mean": statistics.fmean(values) if values else None,
            "spread": spread(values),
            "values": values,
            "seeds": [row["seed"] for row in mine],
            "note": _note(len(values), alone, num_seeds),
        }

    return [
        {"model": model, "memory": memory, "cells": [cell(model, memory, length) for length in lengths]}
        for model in model_names(data)
        for memory in (False, True)
    ]


def _cell_key(row: Row) -> tuple[str, bool, int]:
    return row["model"], row["memory"], row["length"]


def _note(num_values: int, refused_seeds: Sequence[int], num_seeds: int) -> str:
    if not num_values:
        return "no baseline" if refused_seeds else "not measured"
    if refused_seeds:
        return f"seed {', '.join(map(str, refused_seeds))}: no baseline"
    return f"{num_values} of {num_seeds} seeds" if num_values < num_seeds else ""


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float | None]:
    """Element by element; None where the loss below is not positive."""
    return [a / b if b > 0 else None for a, b in zip(above, below, strict=True)]


def measured_bias(data: Report) -> tuple[list[Row], list[Row]]:
    """The exposure-bias rows with at least one step: those that may be compared, and the refused ones."""
    return with_baseline([row for row in data["exposure_bias"] if row["step"]], "model", "seed")


def bias_rows(data: Report) -> list[Row]:
    """The exposure-bias table: per model and memory, per-seed lists of four summaries, and a `note`.

    `max_ratio` and `max_matched` are the largest values over the decoding steps, `sequential` and `static`
    the means over them, in nats per token.
    """
    kept, refused = measured_bias(data)
    num_seeds = len(set(data["seeds"]))
    table = []
    for model in model_names(data):
        for memory in (False, True):
            key = (model, memory)
            mine = sorted((r for r in kept if (r["model"], r["memory"]) == key), key=lambda row: row["seed"])
            alone = sorted(r["seed"] for r in refused if (r["model"], r["memory"]) == key)
            table.append(
                {
                    "model": model,
                    "memory": memory,
                    "seeds": [row["seed"] for row in mine],
                    "max_ratio": _largest(ratios(row["sequential"], row["static"]) for row in mine),
                    "max_matched": _largest(ratios(row["sequential"], row["matched"]) for row in mine),
                    "sequential": [statistics.fmean(row["sequential"]) for row in mine],
                    "static": [statistics.fmean(row["static"]) for row in mine],
                    "note": _note(len(mine), alone, num_seeds),
                }
            )
    return table


def _largest(curves: Iterable[Sequence[float | None]]) -> list[float | None]:
    return [max((value for value in curve if value is not None), default=None) for curve in curves]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a figure: what a model did, without or with memory, in each of its seeds."""

    model: str
    memory: bool
    curves: tuple[tuple[tuple[float, float], ...], ...]
    """One curve of (x, y) points per seed; a y that does not exist has no point."""

    def mean(self) -> list[tuple[float, float]]:
        """The mean over seeds at every x that all seeds have, so that a cut-off seed bends nothing."""
        tables = [dict(curve) for curve in self.curves]
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        return [(x, statistics.fmean(table[x] for table in tables)) for x in shared]


def series_of(data: Report, rows: Iterable[tuple[str, bool, Iterable[tuple[float, float | None]]]]) -> list[Series]:
    """Group (model, memory, points) rows, one per seed, into lines; models in the order of the report."""
    found: dict[tuple[str, bool], list[tuple[tuple[float, float], ...]]] = {}
    for model, memory, points in rows:
        curve = tuple((x, y) for x, y in points if y is not None)
        if curve:
            found.setdefault((model, memory), []).append(curve)
    order = [(model, memory) for model in model_names(data) for memory in (False, True)]
    return [Series(model=key[0], memory=key[1], curves=tuple(found[key])) for key in order if key in found]


def loss_series(data: Report) -> list[Series]:
    """Evaluation loss over training steps; the loss with memory is a series of its own."""
    names = ((False, "eval_nll"), (True, "eval_nll_memory"))
    return series_of(
        data,
        (
            (row["model"], memory, zip(row["curve"]["eval_step"], row["curve"][name], strict=True))
            for row in data["models"]
            for memory, name in names
            if row["curve"][name]
        ),
    )


def bias_series(data: Report, below: str | None) -> list[Series]:
    """Sequential loss over decoding steps, divided by the loss named `below` unless that is None."""
    kept, _ = measured_bias(data)
    return series_of(
        data,
        (
            (
                row["model"],
                row["memory"],
                zip(
                    row["step"],
                    ratios(row["sequential"], row[below]) if below else row["sequential"],
                    strict=True,
                ),
            )
            for row in kept
        ),
    )
