"""Several runs on one page: every number with its interval, its seeds, its baseline and its cost."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from memdlm.outputs import is_page, output_file
from memdlm.report.model import Part
from memdlm.report.pages import render
from memdlm.report.runs import Measured, Score, TaskAccuracy, Training, read_runs
from memdlm.report.tables import AnyRow, PerSeed, with_baseline
from memdlm.version import __version__

_NOT_TRAINING = frozenset(
    [
        *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "logging_steps", "save_steps"),
        *("seed", "data_seed", "resume", "resume_changed", "overwrite_output_dir", "num_proc"),
    ]
)
"""Options that only say where a run is stored and how it is logged; they are not compared."""
_Z = 1.96
"""Half-width of a 95 % interval, in standard errors."""


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Read the runs in `folders` and write one self-contained page to `output`, which is returned.

    A result with memory is shown only beside the one without. Raises DataError as `read_runs` does, ConfigError when
    `output` is a file that memdlm did not write.
    """
    with output_file(output, is_page, "page") as write:
        write(comparison_page(read_runs(folders)).encode())
    return output


def comparison_page(measured: Measured) -> str:
    """Return the page."""
    runs = list(dict.fromkeys(source.run for source in measured.sources))
    return render(
        "comparison.html.j2",
        title=f"{len(runs)} {'run' if len(runs) == 1 else 'runs side by side'}",
        runs=runs,
        version=__version__,
        measured=measured,
        notes_of_all=_notes(measured),
        tasks=list(_by_length(measured)),
        scores=list(_scores(measured)),
        models=list(dict.fromkeys(row.model for row in measured.models if row.options)),
        differing=_differing_options(measured.models),
        costs=sorted(measured.costs, key=attrgetter("model", "tasks", "memory")),
        sources=[
            (f"{source.run}: {source.kind}", f"{source.command}\n\n{_settings(source.settings)}")
            for source in measured.sources
        ],
    )


def _settings(settings: Any) -> str:
    return json.dumps(settings, indent=2, sort_keys=True, default=str)


def _notes(measured: Measured) -> list[str]:
    notes = []
    both: Sequence[tuple[Sequence[Any], tuple[str, str]]] = (
        (measured.accuracy, ("task", "length")),
        (measured.scores, ("task", "metric")),
    )
    for rows, keys in both:
        refused = with_baseline(rows, *keys, "model", "seed")[1]
        for task, model in dict.fromkeys((row.task, row.model) for row in refused):
            notes.append(
                f"Not shown: {task} of {model} with memory, because there is no result without memory to compare with. "
                "Evaluate the same model without mem_enabled and add that run."
            )
    trained = {row.model: _trained_with_memory(row) for row in measured.models}
    if trained and all(trained.values()):
        notes.append(
            "All training runs here use memory, so this page cannot show what training with memory changes. "
            "Train the same recipe without mem_enabled and add that run."
        )
    if not trained and (measured.accuracy or measured.scores):
        notes.append(
            "There is no training run here, so this page cannot show how the models were trained. Add a model that was "
            "trained without memory, evaluated on the same tasks."
        )
    return notes


def _trained_with_memory(row: Training) -> bool:
    told = row.options.get("mem_enabled", False)
    return bool(row.curve.eval_nll_memory) or "memory" in row.config or bool(told)


@dataclass(frozen=True, kw_only=True)
class Estimate(PerSeed):
    """A number for every seed, and the 95 % interval of its mean over questions or documents; None: unknown."""

    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class LengthTable:
    """One task by length. `part` is for its figure; a row is (model, memory, cells); a cell None: not measured."""

    task: str
    description: str
    part: Part
    rows: Sequence[tuple[str, bool, Sequence[Estimate | None]]]


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One score of a model without or with memory."""

    model: str
    memory: bool
    task: str
    metric: str
    estimate: Estimate
    documents: int


def _by_length(measured: Measured) -> Iterator[LengthTable]:
    for name, task in measured.tasks.items():
        rows = [row for row in measured.accuracy if row.task == name]
        kept, _ = with_baseline(rows, "model", "seed", "length")
        if not kept:
            continue
        lengths = tuple(sorted({row.length for row in kept}))
        about = dataclasses.replace(task, lengths=lengths)
        part = measured.part()
        yield LengthTable(
            task=name,
            description=task.description,
            part=dataclasses.replace(part, task=about, accuracy=tuple(kept), models=(), exposure_bias=()),
            rows=[
                (*who, [_accuracy([row for row in mine if row.length == length]) for length in lengths])
                for who, mine in _grouped(kept)
            ],
        )


def _accuracy(rows: Sequence[TaskAccuracy]) -> Estimate | None:
    if not rows:
        return None
    low, high = wilson(statistics.fmean(row.accuracy for row in rows), sum(row.questions for row in rows))
    values = [100 * row.accuracy for row in rows]
    return Estimate(seeds=[row.seed for row in rows], values=values, interval=(100 * low, 100 * high))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` questions (Wilson 1927): never empty, always within 0 to 1."""
    if count == 0:
        return 0.0, 1.0
    extra = _Z**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = _Z / (1 + extra) * (share * (1 - share) / count + extra / (4 * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _interval(rows: Sequence[Score]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over seeds: Wilson's for shares, else from lm-eval's standard errors."""
    errors = [row.stderr for row in rows if row.stderr is not None]
    if len(errors) < len(rows):
        return None
    mean = statistics.fmean(row.value for row in rows)
    if all(map(_is_share, rows)):
        return wilson(mean, sum(row.documents for row in rows))
    half = _Z * sum(error**2 for error in errors) ** 0.5 / len(rows)
    return mean - half, mean + half


def _is_share(row: Score) -> bool:
    """Whether a score is a mean of zeros and ones, as its standard error shows."""
    share, count = row.value, row.documents
    if row.stderr is None or not 0 <= share <= 1 or count < 2:
        return False
    return bool(math.isclose(row.stderr, (share * (1 - share) / (count - 1)) ** 0.5, rel_tol=1e-6, abs_tol=1e-12))


def _scores(measured: Measured) -> Iterator[ScoreRow]:
    kept, _ = with_baseline(measured.scores, "task", "metric", "model", "seed")
    for task, metric in dict.fromkeys((row.task, row.metric) for row in kept):
        rows = [row for row in kept if (row.task, row.metric) == (task, metric)]
        for (model, memory), mine in _grouped(rows):
            seeds, values = [row.seed for row in mine], [row.value for row in mine]
            yield ScoreRow(
                model=model,
                memory=memory,
                task=task,
                metric=metric,
                estimate=Estimate(seeds=seeds, values=values, interval=_interval(mine)),
                documents=max(row.documents for row in mine),
            )


def _differing_options(rows: Sequence[Training]) -> dict[str, dict[str, list[str]]]:
    """Return the options that differ between the training runs that have them: name -> model -> values."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, value in row.options.items():
            values = found.setdefault(name, {}).setdefault(row.model, [])
            if (text := json.dumps(value)) not in values:
                values.append(text)
    return {
        name: values
        for name, values in found.items()
        if name not in _NOT_TRAINING and len({text for each in values.values() for text in each}) > 1
    }


def _grouped(rows: Sequence[AnyRow]) -> list[tuple[tuple[str, bool], list[AnyRow]]]:
    """Group rows by model and memory: models in order of appearance, memory off first, seeds ascending."""
    models = list(dict.fromkeys(row.model for row in rows))
    pairs = [(model, memory) for model in models for memory in (False, True)]
    found = [(pair, [row for row in rows if (row.model, row.memory) == pair]) for pair in pairs]
    return [(pair, sorted(mine, key=attrgetter("seed"))) for pair, mine in found if mine]
