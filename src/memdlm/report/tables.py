"""The numbers of a report as tables and lines, for pages, figures and terminals.

The rule of honest reporting is here, too: a result with inference-time memory is shown only beside the result of the
same model, seed and length without memory. A result without such a baseline is refused (`with_baseline`).
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from memdlm.report.model import Bias, Part, Recall, Task, Written, check_report

AnyRow = TypeVar("AnyRow", bound=Any)
NOT_MEASURED = "not measured"
"""A cell's note. A row in which every cell has it is left out."""


def with_baseline(rows: Sequence[AnyRow], *keys: str) -> tuple[list[AnyRow], list[AnyRow]]:
    """Split rows into those that may be compared and those that are refused.

    A row with memory is refused if no row without memory agrees with it in all `keys`.
    """
    key_of = attrgetter(*keys)
    baselines = {key_of(row) for row in rows if not row.memory}
    kept = [row for row in rows if key_of(row) in baselines]
    return kept, [row for row in rows if key_of(row) not in baselines]


@dataclass(frozen=True, kw_only=True)
class PerSeed:
    """One number of a table for every seed, ascending by seed; None where it is undefined."""

    seeds: Sequence[int]
    values: Sequence[float | None]

    @property
    def known(self) -> list[float]:
        """Return the values that are defined."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """Return the mean over the seeds that have a value; None if none has."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def spread(self) -> float | None:
        """Return the spread over seeds: half the range of two, the standard deviation (n - 1) of three or more."""
        if len(self.known) < 2:
            return None
        return abs(self.known[0] - self.known[1]) / 2 if len(self.known) == 2 else statistics.stdev(self.known)


@dataclass(frozen=True, kw_only=True)
class Cell(PerSeed):
    """Accuracies (0 to 1) at one length, and a note on what is missing, "" if nothing is.

    A cell that must not be compared has no values, and the note "no baseline".
    """

    length: int
    note: str


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """A model with memory off or on: one cell per length, ascending."""

    model: str
    memory: bool
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class BiasRow:
    """Exposure bias of a model with memory off or on.

    `max_ratio` and `max_matched` are maxima over the decoding steps; `sequential` and `static` are means over the
    steps, in nats per token.
    """

    model: str
    memory: bool
    seeds: Sequence[int]
    max_ratio: PerSeed
    max_matched: PerSeed
    sequential: PerSeed
    static: PerSeed
    note: str


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """The cost of training a model."""

    model: str
    parameters: Sequence[int]
    steps: Sequence[int]
    seconds: PerSeed
    milliseconds_per_step: PerSeed


def summary_rows(report: Mapping[str, Any]) -> list[AccuracyRow]:
    """Return a report's accuracy table: per model, memory off, then on. `report` is in JSON types. May be empty."""
    return accuracy_rows(check_report(report))


def accuracy_rows(part: Part) -> list[AccuracyRow]:
    """Return the accuracy table of a report, or of a part of one."""
    if not part.accuracy:
        return []
    kept, refused = with_baseline(part.accuracy, "model", "seed", "length")
    lengths = sorted({*part.task.lengths, *(row.length for row in part.accuracy)})
    key_of = attrgetter("model", "memory", "length")

    def cell(*key: Any) -> Cell:
        mine = sorted((row for row in kept if key_of(row) == key), key=attrgetter("seed"))
        return Cell(
            length=key[-1],
            seeds=[row.seed for row in mine],
            values=[row.accuracy for row in mine],
            note=_note(len(mine), [row.seed for row in refused if key_of(row) == key], part),
        )

    table = [
        AccuracyRow(model=model, memory=memory, cells=[cell(model, memory, length) for length in lengths])
        for model, memory in _pairs(part)
    ]
    return [row for row in table if any(cell.note != NOT_MEASURED for cell in row.cells)]


def bias_rows(part: Part) -> list[BiasRow]:
    """Return the table of exposure bias, in the order of the accuracy table."""
    kept, refused = _measured_bias(part)
    key_of = attrgetter("model", "memory")
    table = []
    for key in _pairs(part):
        mine = sorted((row for row in kept if key_of(row) == key), key=attrgetter("seed"))
        seeds = [row.seed for row in mine]
        table.append(
            BiasRow(
                model=key[0],
                memory=key[1],
                seeds=seeds,
                max_ratio=PerSeed(seeds=seeds, values=[_largest(row, "static") for row in mine]),
                max_matched=PerSeed(seeds=seeds, values=[_largest(row, "matched") for row in mine]),
                sequential=PerSeed(seeds=seeds, values=[statistics.fmean(row.sequential) for row in mine]),
                static=PerSeed(seeds=seeds, values=[statistics.fmean(row.static) for row in mine]),
                note=_note(len(mine), [row.seed for row in refused if key_of(row) == key], part),
            )
        )
    return [row for row in table if row.note != NOT_MEASURED]


def cost_rows(part: Part) -> list[CostRow]:
    """Return the cost of training every model that was trained."""
    table = []
    for model in dict.fromkeys(row.model for row in part.models):
        mine = sorted((row for row in part.models if row.model == model), key=attrgetter("seed"))
        seeds = [row.seed for row in mine]
        per_step = [1000 * row.seconds / row.steps if row.steps else None for row in mine]
        table.append(
            CostRow(
                model=model,
                parameters=sorted({row.parameters for row in mine}),
                steps=sorted({row.steps for row in mine}),
                seconds=PerSeed(seeds=seeds, values=[row.seconds for row in mine]),
                milliseconds_per_step=PerSeed(seeds=seeds, values=per_step),
            )
        )
    return table


def mean_losses(written: Written, is_value: bool) -> list[float | None]:
    """Return the mean losses before and after the write, of value words or of the others; None if there are none."""
    chosen = [place for place, flag in enumerate(written.is_value) if flag == is_value]
    both = (written.before, written.after)
    return [statistics.fmean(losses[place] for place in chosen) if chosen else None for losses in both]


def bias_part(rows: Sequence[Bias], seeds: Sequence[int]) -> Part:
    """Return a part with exposure bias alone, in the form that tables and figures read."""
    task = Task(name="", description="", chance=None, train_length=None, lengths=(), num_questions=0)
    return Part(task=task, seeds=tuple(seeds), models=(), accuracy=(), exposure_bias=tuple(rows))


def _pairs(part: Part) -> list[tuple[str, bool]]:
    return [(model, memory) for model in part.model_names() for memory in (False, True)]


def _note(num_values: int, refused_seeds: Iterable[int], part: Part) -> str:
    alone, num_seeds = ", ".join(map(str, sorted(refused_seeds))), len(set(part.seeds))
    if not num_values:
        return "no baseline" if alone else NOT_MEASURED
    if alone:
        return f"seed {alone}: no baseline"
    return f"{num_values} of {num_seeds} seeds" if num_values < num_seeds else ""


def _measured_bias(part: Part) -> tuple[list[Bias], list[Bias]]:
    """Split the rows with at least one step into those that may be compared and those that are refused."""
    return with_baseline([row for row in part.exposure_bias if row.step], "model", "seed")


def _ratios(row: Bias, below: str) -> list[float | None]:
    """Return the sequential loss divided by the loss named `below`, per step; None where that is not positive."""
    return [a / b if b > 0 else None for a, b in zip(row.sequential, getattr(row, below), strict=True)]


def _largest(row: Bias, below: str) -> float | None:
    return max((value for value in _ratios(row, below) if value is not None), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a figure: a model with memory off or on, and its curves."""

    model: str
    memory: bool
    curves: tuple[tuple[tuple[float, float], ...], ...]
    """One curve of (x, y) points per seed; undefined values have no point."""

    def mean(self) -> list[tuple[float, float]]:
        """Return the mean over seeds at every x that all seeds have, so that a shorter curve distorts nothing."""
        tables = [dict(curve) for curve in self.curves]
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        return [(x, statistics.fmean(table[x] for table in tables)) for x in shared]


def _series(part: Part, rows: Iterable[tuple[str, bool, Sequence[float], Sequence[float | None]]]) -> list[Series]:
    """Group (model, memory, x, y) rows, one per seed, into lines; models in the order of the report."""
    found: dict[tuple[str, bool], list[tuple[tuple[float, float], ...]]] = {}
    for model, memory, x, y in rows:
        curve = tuple((at, value) for at, value in zip(x, y, strict=True) if value is not None) if y else ()
        if curve:
            found.setdefault((model, memory), []).append(curve)
    return [Series(model=key[0], memory=key[1], curves=tuple(found[key])) for key in _pairs(part) if key in found]


def loss_series(part: Part) -> list[Series]:
    """Return evaluation loss over training steps; the loss with memory is a separate series."""
    return _series(
        part,
        (
            (row.model, memory, row.curve.eval_step, losses)
            for row in part.models
            for memory, losses in ((False, row.curve.eval_nll), (True, row.curve.eval_nll_memory))
        ),
    )


def logged_series(part: Part) -> list[Series]:
    """Return what training runs logged: the training loss without memory, and, as series of its own, with it."""
    return _series(
        part,
        (
            (row.model, memory, [step for step, _ in points], [loss for _, loss in points])
            for row in part.models
            for memory, points in ((False, row.logged.without), (True, row.logged.memory))
        ),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """A model's training, one value per seed: the last logged losses in nats per token, steps, seconds."""

    model: str
    values: Mapping[str, PerSeed]


def training_rows(part: Part) -> list[TrainingRow]:
    """Return the table of training runs; columns that no run has are left out."""
    columns: dict[str, Callable[[Any], float | None]] = {
        "last training loss": lambda row: _last(row.logged.without),
        "the same with memory": lambda row: _last(row.logged.memory),
        "last evaluation loss": lambda row: row.curve.eval_nll[-1] if row.curve.eval_nll else None,
        "steps": lambda row: row.logged.steps,
        "seconds": lambda row: row.logged.seconds,
    }
    kept = {name: read for name, read in columns.items() if any(read(row) is not None for row in part.models)}
    found = []
    for model in dict.fromkeys(row.model for row in part.models):
        mine = sorted((row for row in part.models if row.model == model), key=attrgetter("seed"))
        values = {
            name: PerSeed(seeds=[row.seed for row in mine], values=[read(row) for row in mine])
            for name, read in kept.items()
        }
        found.append(TrainingRow(model=model, values=values))
    return found if kept else []


def _last(points: Sequence[tuple[float, float]]) -> float | None:
    return points[-1][1] if points else None


def training_series(part: Recall) -> list[Series]:
    """Return the training loss over steps of the models in `leak`, without and with memory."""
    return _series(
        part,
        (
            (row.model, memory, row.curve.step, losses)
            for row in part.models
            if row.model in part.leak
            for memory, losses in ((False, row.curve.nll), (True, row.curve.nll_memory))
        ),
    )


def bias_series(part: Part, below: str | None) -> list[Series]:
    """Return the sequential loss over decoding steps, divided by the loss named `below` unless that is None."""
    rows, _ = _measured_bias(part)
    return _series(
        part, ((row.model, row.memory, row.step, _ratios(row, below) if below else row.sequential) for row in rows)
    )
