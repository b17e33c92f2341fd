"""Several runs on one page: every figure with its interval, its seeds and its baseline, and what it cost."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from memdlm.outputs import is_page, output_file
from memdlm.report.data import Row, spread, with_baseline
from memdlm.report.figures import accuracy_by_length
from memdlm.report.html import document, figure, fold, table
from memdlm.report.page import bias_section, training_section
from memdlm.report.runs import Measured, read_runs
from memdlm.version import __version__

_NONE = '<p class="missing">None of the runs has measured it.</p>'
_NOT_TRAINING = frozenset(
    [
        *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "logging_steps", "save_steps"),
        *("seed", "data_seed", "resume", "resume_changed", "overwrite_output_dir", "num_proc"),
    ]
)
"""Options that say where a run is and how it is watched."""
_Z = 1.96
"""Standard errors in half of a 95 % interval."""


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Read the runs in `folders` and write one self-contained page to `output`, which is returned.

    A result with memory is shown only beside the one without. Raises DataError as `read_runs` does, ConfigError when
    `output` is a file that is no page of memdlm's.
    """
    with output_file(output, is_page, "page") as write:
        write(comparison_page(read_runs(folders)).encode())
    return output


def comparison_page(measured: Measured) -> str:
    """Return the page."""
    runs = list(dict.fromkeys(source["run"] for source in measured.sources))
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in _notes(measured))
    title = f"{len(runs)} {'run' if len(runs) == 1 else 'runs side by side'}"
    header = f'<h1>{title}</h1>\n<p class="facts">{escape(", ".join(runs))}; memdlm {__version__}</p>'
    return document(
        title,
        header + (f'\n<ul class="notes">\n{notes}\n</ul>' if notes else ""),
        (
            ("Accuracy by length", _by_length(measured)),
            ("Scores", _scores(measured)),
            ("Training", _training(measured)),
            ("Exposure bias", bias_section(measured.part()) if measured.exposure_bias else _NONE),
            ("Cost", _costs(measured)),
            ("Where the figures come from", _sources(measured)),
        ),
    )


def _notes(measured: Measured) -> list[str]:
    notes = []
    for rows, keys in ((measured.accuracy, ("task", "length")), (measured.scores, ("task", "metric"))):
        refused = with_baseline(rows, *keys, "model", "seed")[1]
        for task, model in dict.fromkeys((row["task"], row["model"]) for row in refused):
            notes.append(
                f"Not shown: {task} of {model} with memory, because no run without memory stands beside it. "
                "Evaluate the same model without mem_enabled and add that run."
            )
    trained = {row["model"]: _trained_with_memory(row) for row in measured.models}
    if trained and all(trained.values()):
        notes.append(
            "All training runs here use memory: what training with memory changes cannot be read from this page. "
            "Train the same recipe without mem_enabled and add that run."
        )
    if not trained and (measured.accuracy or measured.scores):
        notes.append(
            "No training run is among these, so the page cannot tell how models were trained: name the standard model "
            "(trained without memory) beside the others, and evaluate it on the same tasks."
        )
    return notes


def _trained_with_memory(row: Row) -> bool:
    told = row.get("options", {}).get("mem_enabled", False)
    return bool(row["curve"]["eval_nll_memory"]) or "memory" in row["config"] or bool(told)


def _by_length(measured: Measured) -> str:
    parts = []
    for task, about in measured.tasks.items():
        rows = [row for row in measured.accuracy if row["task"] == task]
        kept, _ = with_baseline(rows, "model", "seed", "length")
        if not kept:
            continue
        lengths = sorted({row["length"] for row in kept})
        part = measured.part(accuracy=kept, models=[], exposure_bias=[], task={**about, "lengths": lengths})
        chance = "" if about["chance"] is None else f" Chance is {100 * about['chance']:.1f} %."
        body = [
            [*_names(*who), *(_cell([row for row in mine if row["length"] == length]) for length in lengths)]
            for who, mine in _grouped(kept)
        ]
        caption = (
            "Percent, mean over seeds; below it the 95 % interval that the number of questions allows, and how far "
            f"seeds lie apart where there are several.{chance}"
        )
        drawn = figure(part, accuracy_by_length, name=f"{task}: accuracy by length", caption=about["description"])
        head = ["model", "memory", *map(str, lengths)]
        parts.append(f"<h3>{escape(task)}</h3>\n{table(caption, head, body, num_text=2)}\n{drawn}")
    return "\n".join(parts) or _NONE


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return '<td class="missing">not measured</td>'
    values = [{**row, "value": 100 * row["accuracy"]} for row in rows]
    share = statistics.fmean(row["accuracy"] for row in rows)
    low, high = wilson(share, sum(row["questions"] for row in rows))
    return _value(values, 1, (100 * low, 100 * high))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` questions (Wilson 1927): never empty, never outside 0 to 1."""
    if count == 0:
        return 0.0, 1.0
    extra = _Z**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = _Z / (1 + extra) * (share * (1 - share) / count + extra / (4 * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _value(rows: Sequence[Row], digits: int, interval: tuple[float, float] | None) -> str:
    """A cell: the mean over seeds, its 95 % interval over documents, and the spread over seeds."""
    values = [row["value"] for row in rows]
    each = "; ".join(f"seed {row['seed']}: {row['value']:.{digits}f}" for row in rows)
    lines = [f"{statistics.fmean(values):.{digits}f}"]
    if interval is not None:
        lines.append(f"<small>{interval[0]:.{digits}f} to {interval[1]:.{digits}f}</small>")
    apart = spread(values)
    if apart is not None:
        lines.append(f"<small>{len(rows)} seeds &plusmn; {apart:.{digits}f}</small>")
    return f'<td title="{escape(each)}">{"".join(lines)}</td>'


def _interval(rows: Sequence[Row]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over seeds: of a share as Wilson's, else from lm-eval's errors over documents."""
    errors = [row["stderr"] for row in rows if row["stderr"] is not None]
    if len(errors) < len(rows):
        return None
    mean = statistics.fmean(row["value"] for row in rows)
    if all(map(_is_share, rows)):
        return wilson(mean, sum(row["documents"] for row in rows))
    half = _Z * sum(error**2 for error in errors) ** 0.5 / len(rows)
    return mean - half, mean + half


def _is_share(row: Row) -> bool:
    """Whether a score is a mean of zeros and ones: its standard error is then that of a share."""
    share, count = row["value"], row["documents"]
    if not 0 <= share <= 1 or count < 2:
        return False
    return bool(math.isclose(row["stderr"], (share * (1 - share) / (count - 1)) ** 0.5, rel_tol=1e-6, abs_tol=1e-12))


def _scores(measured: Measured) -> str:
    kept, _ = with_baseline(measured.scores, "task", "metric", "model", "seed")
    if not kept:
        return _NONE
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in kept))
    body = []
    for task, metric in columns:
        rows = [row for row in kept if (row["task"], row["metric"]) == (task, metric)]
        for (model, memory), mine in _grouped(rows):
            documents = f"<td>{max(row['documents'] for row in mine):,}</td>"
            body.append(
                [
                    *_names(model, memory),
                    f'<td class="text">{escape(task)}</td>',
                    _text(metric),
                    _value(mine, 4, _interval(mine)),
                    documents,
                ]
            )
    caption = (
        "As lm-eval reports them, mean over seeds; below each the 95 % interval over its documents, and how far seeds "
        "lie apart where there are several."
    )
    return table(caption, ["model", "memory", "task", "metric", "score", "documents"], body, num_text=4)


def _training(measured: Measured) -> str:
    parts = []
    if any(row["curve"]["eval_nll"] for row in measured.models):
        parts.append(training_section(measured.part(accuracy=[], exposure_bias=[])))
    told = _differing_options(measured.models)
    if told:
        models = list(dict.fromkeys(row["model"] for row in measured.models if row.get("options")))
        body = [
            [f'<th scope="row">{escape(name)}</th>', *(_text(", ".join(values.get(model, ()))) for model in models)]
            for name, values in told.items()
        ]
        caption = "The options in which the training runs differ: which are baselines, and what else is not the same."
        parts.append(table(caption, ["option", *models], body, num_text=1 + len(models)))
    return "\n".join(parts) or _NONE


def _differing_options(rows: Sequence[Row]) -> dict[str, dict[str, list[str]]]:
    """Per option that is not the same in all training runs that have it: its values by model."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, value in row.get("options", {}).items():
            values = found.setdefault(name, {}).setdefault(row["model"], [])
            if (text := json.dumps(value)) not in values:
                values.append(text)
    return {
        name: values
        for name, values in found.items()
        if name not in _NOT_TRAINING and len({text for each in values.values() for text in each}) > 1
    }


def _costs(measured: Measured) -> str:
    if not measured.costs:
        return _NONE
    columns: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("requests", "requests", lambda value: f"{value:,}"),
        ("seconds", "seconds", lambda value: f"{value:.1f}"),
        ("tokens/s", "tokens_per_second", lambda value: f"{value:.1f}"),
        ("passes", "forward_passes", lambda value: f"{value:,}"),
        ("written", "written_tokens", lambda value: f"{value:,}"),
        ("ms/written token", "write_ms_per_token", lambda value: f"{value:.3f}"),
        ("peak GB", "peak_memory_bytes", lambda value: f"{value / 1e9:.2f}"),
    )
    body = [
        [
            *_names(row["model"], row["memory"]),
            _text(", ".join(row["tasks"])),
            *(f"<td>{'' if row[name] is None else show(row[name])}</td>" for _, name, show in columns),
        ]
        for row in sorted(measured.costs, key=lambda row: (row["model"], row["tasks"], row["memory"]))
    ]
    several = max(row["processes"] for row in measured.costs) > 1
    caption = (
        "One line per evaluation. Seconds are wall-clock time of answering, writes included; passes are those of "
        "decoding and scoring; written are the tokens that went into memory; peak memory is the GPU's, or without one "
        f"the whole process's.{' With several processes: those of the first.' if several else ''}"
    )
    return table(caption, ["model", "memory", "tasks", *(name for name, _, _ in columns)], body, num_text=3)


def _sources(measured: Measured) -> str:
    folded = []
    for source in measured.sources:
        settings = json.dumps(source["settings"], indent=2, sort_keys=True, default=str)
        folded.append(fold(f"{source['run']}: {source['kind']}", f"{source['command']}\n\n{settings}"))
    return "\n".join(folded)


def _grouped(rows: Sequence[Row]) -> list[tuple[tuple[str, bool], list[Row]]]:
    """Rows of one model and memory setting, models in their order, memory off first, seeds ascending."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    pairs = [(model, memory) for model in models for memory in (False, True)]
    found = [(pair, [row for row in rows if (row["model"], row["memory"]) == pair]) for pair in pairs]
    return [(pair, sorted(mine, key=lambda row: row["seed"])) for pair, mine in found if mine]


def _names(model: str, memory: bool) -> tuple[str, str]:
    return f'<th scope="row">{escape(model)}</th>', f'<td class="text">{"on" if memory else "off"}</td>'


def _text(text: str) -> str:
    return f'<td class="text">{escape(text)}</td>'
