"""The demo's first panel: what a memory can hold that nothing else of the model can see."""

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from memdlm.report.accuracy import accuracy_section
from memdlm.report.data import Report, Row, Series, series_of
from memdlm.report.figures import GREY, draw_series
from memdlm.report.html import figure, missing

TITLE = "Memorise, then answer with the prompt gone"


def recall_section(part: Report) -> str:
    """Who answers from memory alone, how the published training loss fools itself, and a memory being written."""
    task = part["task"]
    return "\n".join(
        [
            f"<p><strong>Task: {escape(task['name'])}.</strong> {escape(task['description'])}</p>",
            accuracy_section(part, shows_seeds=True),
            "<h3>Training loss with and without memory</h3>",
            _leak(part),
            "<h3>A memory being written</h3>",
            *(_written(row, is_open=not index) for index, row in enumerate(_rows_with_words(part))),
            "" if _rows_with_words(part) else missing("The loss per written word"),
        ]
    )


def training_losses(axes: Axes, part: Report) -> None:
    """Training loss over steps, without memory and with the memory that training writes, and the entropy floor."""
    series = _losses(part)
    if not series:
        return

    def name(one: Series) -> str:
        return f"{one.model}, memory as training writes it" if one.memory else f"{one.model}, without memory"

    draw_series(axes, part, series, name)
    floor = part["floor"]
    axes.axhline(floor, color=GREY, linestyle=(0, (2, 2)), linewidth=1.2, label=f"entropy floor {floor:.2f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set(xlabel="training step", ylabel="nats per token (logarithmic)")


def _losses(part: Report) -> list[Series]:
    return series_of(
        part,
        (
            (row["model"], is_memory, zip(row["curve"]["step"], row["curve"][name], strict=True))
            for row in part["models"]
            if row["model"] in part["leak"]
            for is_memory, name in ((False, "nll"), (True, "nll_memory"))
            if row["curve"].get(name)
        ),
    )


def _leak(part: Report) -> str:
    if not _losses(part):
        return missing("The training loss")
    return figure(
        part,
        training_losses,
        name="Training loss with and without memory",
        caption=f"The grey line, {part['floor']:.2f} nats per token, is the least that a model can lose that does not "
        "see the facts (the few facts that lie next to the questions aside). The published recipe writes its memory, "
        "in training, from the labels that the loss then scores. Its loss with memory may therefore fall below that "
        "line without anything having been learned that answers a question; what the model itself lost is the line "
        "without memory. Thick: mean over seeds; thin: single seeds.",
    )


def _rows_with_words(part: Report) -> list[Row]:
    return [row for row in part["models"] if row.get("written")]


def _written(row: Row, *, is_open: bool) -> str:
    """Every word of one prompt with its loss before and after the write."""
    written: dict[str, Any] = row["written"]
    highest = max([*written["before"], *written["after"], 1e-9])
    words = "\n".join(
        f'<span class="word{" asked" if asked else ""}" title="before {before:.2f}, after {after:.2f} nats">'
        f'{escape(word)}<i style="width:{100 * before / highest:.0f}%"></i>'
        f'<i class="after" style="width:{100 * after / highest:.0f}%"></i></span>'
        for word, before, after, asked in zip(*(written[name] for name in WRITTEN), strict=True)
    )
    answers, others = (_means(written, is_asked) for is_asked in (True, False))
    return (
        f"<details{' open' if is_open else ''}>\n<summary>{escape(row['model'])}, seed {row['seed']}</summary>\n"
        f'<div class="words">\n{words}\n</div>\n<p class="caption">One prompt, word by word: each is masked alone, its '
        "neighbours in sight. Upper bar: its loss before the prompt was written; lower bar, in colour: after. In bold: "
        f"the values of the facts, {answers}; the other words: {others} nats on average. The longest bar is "
        f"{highest:.1f} nats.</p>\n</details>"
    )


WRITTEN = ("words", "before", "after", "is_value")


def _means(written: dict[str, Any], is_value: bool) -> str:
    chosen = [place for place, flag in enumerate(written["is_value"]) if flag == is_value]
    before, after = (_mean([written[name][place] for place in chosen]) for name in ("before", "after"))
    return f"{before} before, {after} after"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f}" if values else "none"
