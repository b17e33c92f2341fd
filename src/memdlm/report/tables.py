"""The numbers of a report as tables and lines, each computed here once, for pages, figures and terminals.

The rule of honest reporting lives here too: a result with inference-time memory counts only beside the result
of the same model, seed and length without memory. One that stands alone is refused (`with_baseline`).
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from memdlm.report.model import Bias, Part, Recall, Task, Written, check_report

AnyRow = TypeVar("AnyRow", bound=Any)


def with_baseline(rows: Sequence[AnyRow], *keys: str) -> tuple[list[AnyRow], list[AnyRow]]:
    """Split into the rows that may be compared and the refused ones.

    Refused is a row with memory for which no row without memory agrees in all `keys`.
    """
    key_of = attrgetter(*keys)
    baselines = {key_of(row) for row in rows if not row.memory}
    kept = [row for row in rows if key_of(row) in baselines]
    return kept, [row for row in rows if key_of(row) not in baselines]


@dataclass(frozen=True, kw_only=True)
class PerSeed:
    """One figure of a table in every seed, ascending by seed; None: undefined there."""

    seeds: Sequence[int]
    values: Sequence[float | None]

    @property
    def known(self) -> list[float]:
        """The values that are defined."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean over the seeds where it is defined."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def spread(self) -> float | None:
        """How far seeds lie apart: half the range of two, the standard deviation (n - 1) of three or more."""
        if len(self.known) < 2:
            return None
        return abs(self.known[0] - self.known[1]) / 2 if len(self.known) == 2 else statistics.stdev(self.known)


@dataclass(frozen=True, kw_only=True)
class Cell(PerSeed):
    """Accuracies in 0..1 at one length, and what is missing: "" where nothing is.

    A cell that must not be compared has no values and the note "no baseline".
    """

    length: int
    note: str


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """A model without or with memory: one cell per length, ascending."""

    model: str
    memory: bool
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class BiasRow:
    """Exposure bias of a model without or with memory.

    `max_ratio` and `max_matched` are the largest values over the decoding steps, `sequential` and `static` the means
    over them, in nats per token.
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
    """What training a model took; all empty where it was not measured."""

    model: str
    parameters: Sequence[int]
    steps: Sequence[int]
    seconds: PerSeed
    milliseconds_per_step: PerSeed


def summary_rows(report: Mapping[str, Any]) -> list[AccuracyRow]:
    """The accuracy table of a report in JSON types: per model, first memory off, then on. Without accuracy: no rows."""
    return accuracy_rows(check_report(report))


def accuracy_rows(part: Part) -> list[AccuracyRow]:
    """The same of a report that was read, or of a part of one."""
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

    return [
        AccuracyRow(model=model, memory=memory, cells=[cell(model, memory, length) for length in lengths])
        for model, memory in _pairs(part)
    ]


def bias_rows(part: Part) -> list[BiasRow]:
    """The table of exposure bias, ordered as that of accuracy."""
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
    return table


def cost_rows(part: Part) -> list[CostRow]:
    """What the training of every model took."""
    table = []
    for model in part.model_names():
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
    """Mean losses before and after the write, of the words that are values or of the others; None: there are none."""
    chosen = [place for place, flag in enumerate(written.is_value) if flag == is_value]
    both = (written.before, written.after)
    return [statistics.fmean(losses[place] for place in chosen) if chosen else None for losses in both]


def bias_part(rows: Sequence[Bias], seeds: Sequence[int]) -> Part:
    """Exposure bias alone, as tables and figures read it."""
    task = Task(name="", description="", chance=None, train_length=None, lengths=(), num_questions=0)
    return Part(task=task, seeds=tuple(seeds), models=(), accuracy=(), exposure_bias=tuple(rows))


def _pairs(part: Part) -> list[tuple[str, bool]]:
    return [(model, memory) for model in part.model_names() for memory in (False, True)]


def _note(num_values: int, refused_seeds: Iterable[int], part: Part) -> str:
    alone, num_seeds = ", ".join(map(str, sorted(refused_seeds))), len(set(part.seeds))
    if not num_values:
        return "no baseline" if alone else "not measured"
    if alone:
        return f"seed {alone}: no baseline"
    return f"{num_values} of {num_seeds} seeds" if num_values < num_seeds else ""


def _measured_bias(part: Part) -> tuple[list[Bias], list[Bias]]:
    """The rows with at least one step: those that may be compared, and the refused ones."""
    return with_baseline([row for row in part.exposure_bias if row.step], "model", "seed")


def _ratios(row: Bias, below: str) -> list[float | None]:
    """The sequential loss by the one named `below`, step by step; None where that is not positive."""
    return [a / b if b > 0 else None for a, b in zip(row.sequential, getattr(row, below), strict=True)]


def _largest(row: Bias, below: str) -> float | None:
    return max((value for value in _ratios(row, below) if value is not None), default=None)


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


def _series(part: Part, rows: Iterable[tuple[str, bool, Sequence[float], Sequence[float | None]]]) -> list[Series]:
    """Group (model, memory, x, y) rows, one per seed, into lines; models in the order of the report."""
    found: dict[tuple[str, bool], list[tuple[tuple[float, float], ...]]] = {}
    for model, memory, x, y in rows:
        curve = tuple((at, value) for at, value in zip(x, y, strict=True) if value is not None) if y else ()
        if curve:
            found.setdefault((model, memory), []).append(curve)
    return [Series(model=key[0], memory=key[1], curves=tuple(found[key])) for key in _pairs(part) if key in found]


def loss_series(part: Part) -> list[Series]:
    """Evaluation loss over training steps; the loss with memory is a series of its own."""
    return _series(
        part,
        (
            (row.model, memory, row.curve.eval_step, losses)
            for row in part.models
            for memory, losses in ((False, row.curve.eval_nll), (True, row.curve.eval_nll_memory))
        ),
    )


def training_series(part: Recall) -> list[Series]:
    """Training loss over steps of the models in `leak`, without memory and with it."""
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
    """Sequential loss over decoding steps, divided by the loss named `below` unless that is None."""
    rows, _ = _measured_bias(part)
    return _series(
        part, ((row.model, row.memory, row.step, _ratios(row, below) if below else row.sequential) for row in rows)
    )
