"""The figures of a report: drawn without pyplot, legible without colour, the same bytes every time."""

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from memdlm.report.finding import at_training_length
from memdlm.report.model import Part, Recall
from memdlm.report.tables import Series, accuracy_rows, bias_series, logged_series, loss_series, training_series

Draw: TypeAlias = Callable[[Axes, Any], None]
"""Draws a part on the axes; lines that belong in the legend have labels."""

_EMPTY = "nothing comparable was measured"
WIDE = (7.0, 3.7)
"""Inches, before the legend below is added: a page on a screen."""
NARROW = (3.6, 2.9)
"""Inches, before the legend below is added: a phone, or a third of a page."""

# Okabe and Ito's palette, ordered by contrast on white; there are fewer markers than colours, so pairs repeat late.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#666666"
_DASHED = (0, (5, 2))
_DOTTED = (0, (2, 2))
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "text.parse_math": False,
    "svg.hashsalt": "memdlm",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One plot of exposure bias, with a caption that says what it measures."""

    title: str
    caption: str
    draw: Draw


@contextmanager
def _style() -> Iterator[None]:
    """Use matplotlib's defaults and ours, and ignore the user's configuration file."""
    with matplotlib.style.context("default"), matplotlib.rc_context(_STYLE):
        yield


def png(panels: Sequence[tuple[str, Draw]], part: Part, *, size: tuple[float, float] = WIDE) -> bytes:
    """Return a PNG of titled panels side by side, with one legend."""
    with _style():
        buffer = io.BytesIO()
        FigureCanvasAgg(_figure(panels, part, size)).print_png(
            buffer, metadata={"Software": None}, pil_kwargs={"dpi": (160, 160)}
        )
    return buffer.getvalue()


def svg(draw: Draw, part: Part, *, size: tuple[float, float]) -> bytes:
    """Return an SVG of one panel, without a title (the page has one); text is drawn as outlines, to need no font."""
    with _style():
        buffer = io.BytesIO()
        FigureCanvasSVG(_figure([("", draw)], part, size)).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return buffer.getvalue()


def _figure(panels: Sequence[tuple[str, Draw]], part: Part, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    handles: dict[str, Line2D] = {}
    for axes, (title, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, part)
        axes.set_title(title, loc="left")
        if not axes.lines:
            axes.text(0.5, 0.5, _EMPTY, transform=axes.transAxes, ha="center", va="center", color=_GREY)
            axes.set_axis_off()
        handles |= {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    if handles:
        _add_legend(figure, handles, size)
    return figure


def _add_legend(figure: Figure, handles: dict[str, Line2D], size: tuple[float, float]) -> None:
    """Add a legend below the axes, in as many columns as fit. Long names wrap; the figure grows with the rows."""
    border, letter = 0.65, 0.08  # in inches: a handle with the gaps around it; one letter of a name
    names = [textwrap.fill(name, max(12, int((size[0] - border) / letter))) for name in handles]
    widest = border + letter * max(len(line) for name in names for line in name.splitlines())
    rows = math.ceil(len(names) / max(1, int((size[0] + 0.25) / widest)))
    columns = math.ceil(len(names) / rows)
    lines = [name.count("\n") + 1 for name in names]
    height = max(sum(lines[start : start + rows]) for start in range(0, len(lines), rows))
    figure.set_figheight(size[1] + 0.21 * height)
    figure.legend(
        list(handles.values()),
        names,
        loc="outside lower center",
        ncols=columns,
        columnspacing=1.5,
        frameon=False,
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """A model's colour and marker; with memory, the line is dashed and the marker hollow."""

    colour: str
    marker: str
    memory: bool

    def line(self, axes: Axes, points: Sequence[tuple[float, float]], label: str) -> None:
        """Draw the mean over seeds."""
        if not points:
            return
        x, y = zip(*points, strict=True)
        axes.plot(
            x,
            y,
            color=self.colour,
            marker=self.marker,
            markerfacecolor="white" if self.memory else self.colour,
            markevery=max(1, math.ceil(len(points) / 10)),
            linestyle=_DASHED if self.memory else "-",
            label=label,
            zorder=3,
        )

    def seed(self, axes: Axes, points: Sequence[tuple[float, float]]) -> None:
        """Draw one seed as a thin line."""
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=self.colour, linewidth=0.7, alpha=0.45, zorder=2)


def _look(part: Part, model: str, memory: bool) -> _Look:
    index = part.model_names().index(model)
    return _Look(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)], memory)


def _label(model: str, memory: bool) -> str:
    return f"{model} + memory" if memory else model


def accuracy_by_length(axes: Axes, part: Part) -> None:
    """Draw mean accuracy over length, single seeds as dots, and chance as a grey dashed line."""
    rows = [row for row in accuracy_rows(part) if any(cell.values for cell in row.cells)]
    if not rows:
        return
    lengths = [cell.length for cell in rows[0].cells]
    span = max(lengths[-1] / lengths[0], 1.5)
    # Points are shifted a little sideways, so that equal accuracies do not hide each other.
    apart = min(0.014, 0.3 / len(lengths) / len(rows))
    for index, row in enumerate(rows):
        aside = span ** (apart * (index - (len(rows) - 1) / 2))
        look = _look(part, row.model, row.memory)
        means = [(cell.length * aside, 100 * cell.mean) for cell in row.cells if cell.mean is not None]
        look.line(axes, means, _label(row.model, row.memory))
        dots = [(cell.length * aside, 100 * value) for cell in row.cells for value in cell.known]
        x, y = zip(*dots, strict=True)
        axes.scatter(x, y, s=11, color=look.colour, alpha=0.6, linewidths=0, zorder=4)
    if part.task.chance is not None:
        chance = 100 * part.task.chance
        axes.axhline(chance, color=_GREY, linestyle=_DOTTED, linewidth=1.2, label=f"chance {chance:.1f} %")
    axes.set_xscale("log")
    axes.set_xlim(lengths[0] / span**0.07, lengths[-1] * span**0.07)
    trained = part.task.train_length
    axes.set_xticks(lengths, [f"{n}\n{multiple(n, trained)}" if trained else f"{n}" for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-3, 104)
    axes.set(xlabel=f"length{' (multiple of the training length)' if trained else ''}", ylabel="accuracy, %")


def recalled(axes: Axes, part: Recall) -> None:
    """Draw every model's accuracy at the training length: a bar with its memory, a tick without, and chance."""
    shares = {(row.model, row.memory): at_training_length(row, part) for row in accuracy_rows(part)}
    models = [model for model in part.model_names() if shares.get((model, True)) is not None]
    tick: dict[str, Any] = {"color": _COLOURS[1], "linestyle": "none", "marker": "|", "mew": 3}
    for place, model in enumerate(models):
        on, off = 100 * (shares[model, True] or 0), 100 * (shares.get((model, False)) or 0)
        first = not place
        label = "with its memory" if first else "_again"
        axes.plot([0, on], [place, place], color=_COLOURS[0], linewidth=14, solid_capstyle="butt", label=label)
        axes.plot([off], [place], markersize=22, label="_tick", **tick)
        axes.text(max(on, off) + 2, place, f"{on:.0f} %", va="center")
    if not models:
        return
    # The tick of the legend is shorter: it must not reach into the lines above and below.
    axes.plot([], [], markersize=10, label="memory switched off", **tick)
    if part.task.chance is not None:
        chance = 100 * part.task.chance
        axes.axvline(chance, color=_GREY, linestyle=_DOTTED, linewidth=1.2, label=f"guessing, {chance:.1f} %")
    axes.set_yticks(range(len(models)), [textwrap.fill(model, 14) for model in models])
    axes.set(ylim=(len(models) - 0.4, -0.6), xlim=(0, 112), xticks=range(0, 101, 25), xlabel="right answers, %")
    axes.grid(visible=False, axis="y")


def multiple(length: int, train_length: int) -> str:
    """Return a length as a multiple of the training length, such as "4\N{MULTIPLICATION SIGN}"."""
    return f"{length / train_length:.3g}\N{MULTIPLICATION SIGN}"


def _draw_series(axes: Axes, part: Part, series: Sequence[Series], name: Callable[[Series], str]) -> None:
    """Draw the mean of each series, and its seeds as thin lines."""
    for one in series:
        look = _look(part, one.model, one.memory)
        mean = one.mean()
        if len(one.curves) > 1:
            for curve in one.curves:
                look.seed(axes, curve)
        # Seeds without a common step have no mean: each is drawn as a full line, all under one name.
        for number, points in enumerate([mean] if mean else one.curves):
            look.line(axes, points, "_again" if number else name(one))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def training_curves(axes: Axes, part: Part) -> None:
    """Draw evaluation loss over training steps: solid without memory, dashed with it."""

    def name(series: Series) -> str:
        return f"{series.model} + memory (not comparable)" if series.memory else series.model

    series = loss_series(part)
    if series:
        _draw_series(axes, part, series, name)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="training step", ylabel="evaluation loss, nats per token")


def logged_losses(axes: Axes, part: Part) -> None:
    """Draw the training loss that runs logged, over steps: solid without memory, dashed with it."""

    def name(series: Series) -> str:
        return f"{series.model} + memory (not comparable)" if series.memory else series.model

    series = logged_series(part)
    if series:
        _draw_series(axes, part, series, name)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="training step", ylabel="training loss, nats per token")


def training_losses(axes: Axes, part: Recall) -> None:
    """Draw training loss over steps, without memory and with the memory that training writes, and the floor."""
    series = training_series(part)
    if not series:
        return

    def name(one: Series) -> str:
        return f"{one.model}, memory as training writes it" if one.memory else f"{one.model}, without memory"

    _draw_series(axes, part, series, name)
    axes.axhline(part.floor, color=_GREY, linestyle=_DOTTED, linewidth=1.2, label=f"entropy floor {part.floor:.2f}")
    _logarithmic(axes)
    axes.set(xlabel="training step", ylabel="nats per token (logarithmic)")


def _logarithmic(axes: Axes) -> None:
    """Use a logarithmic scale with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _draw_bias(axes: Axes, part: Part, below: str | None) -> None:
    series = bias_series(part, below)
    if not series:
        return
    if below:
        axes.axhline(1, color=_GREY, linestyle=_DOTTED, linewidth=1.2)
    _draw_series(axes, part, series, lambda one: _label(one.model, one.memory))
    axes.set(xlabel="decoding step", ylabel="ratio" if below else "nats per token")
    if not below:
        axes.set_ylim(bottom=0)
        return
    # Both ratios have the same scale, so that their difference can be seen.
    both = [*bias_series(part, "static"), *bias_series(part, "matched")]
    values = [1.0, *(y for one in both for curve in one.curves for _, y in curve)]
    if max(values) > 10 and min(values) > 0:
        _logarithmic(axes)
        axes.set_ylim(min(values) / 1.15, max(values) * 1.15)
        axes.set_ylabel("ratio (logarithmic)")
    else:
        axes.set_ylim(0, max(values) * 1.06)


BIAS_PANELS = (
    Panel(
        title="Ratio of the paper: sequential / static",
        caption="Loss while the model decodes, divided by its loss on the true text with as many tokens "
        "masked at random. It also grows because confident decoding leaves the hardest tokens for last, so "
        "it does not show error propagation alone.",
        draw=lambda axes, part: _draw_bias(axes, part, "static"),
    ),
    Panel(
        title="Sequential loss itself",
        caption="Loss per token that is still masked, while the model decodes from its own earlier tokens. A "
        "lower ratio with a higher loss here is no improvement.",
        draw=lambda axes, part: _draw_bias(axes, part, None),
    ),
    Panel(
        title="Matched ratio: sequential / matched",
        caption="The same loss, divided by the loss on the same masked tokens with the true tokens around "
        "them. What exceeds 1 is the cost of the model's own errors (scale as in the first panel).",
        draw=lambda axes, part: _draw_bias(axes, part, "matched"),
    ),
)
