"""HTML pages: the templates, the functions they may call, and the page of a demo's report."""

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from memdlm.outputs import GENERATOR
from memdlm.report.figures import (
    BIAS_PANELS,
    NARROW,
    WIDE,
    Draw,
    accuracy_by_length,
    logged_losses,
    multiple,
    recalled,
    svg,
    training_curves,
    training_losses,
)
from memdlm.report.finding import finding
from memdlm.report.model import Part, Report
from memdlm.report.records import plain
from memdlm.report.tables import (
    accuracy_rows,
    bias_rows,
    cost_rows,
    logged_series,
    mean_losses,
    training_rows,
    training_series,
)

RECALL = "Memorise, then answer with the prompt gone"
"""Title of the section about recall, which comes first."""
OPEN_BOOK = "Answer with the prompt in sight"
"""Title of the section in which attention reaches everything."""


def render(template: str, **values: Any) -> str:
    """Fill a template; it escapes all texts."""
    return _ENVIRONMENT.get_template(template).render(values)


def page(report: Report) -> str:
    """Return the page of a report."""
    return render(
        "report.html.j2",
        title=report.title,
        report=report,
        found="" if report.recall is None else finding(report.recall),
        about={**((report.recall and report.recall.about) or {}), **(report.about or {})},
        facts=[fact for fact in _facts(report) if fact],
        configurations=list(_configurations(report)),
    )


def _facts(report: Report) -> Iterator[str | None]:
    machine, steps = report.machine, sorted({row.steps for row in report.models})
    seeds = ", ".join(map(str, report.seeds))
    yield "quick run" if report.quick else None
    yield f"{'seed' if len(report.seeds) == 1 else 'seeds'} {seeds}" if seeds else None
    yield f"{span(steps)} training steps" if steps else None
    yield duration(report.seconds.total)
    yield machine.device
    yield f"{machine.cores} {'core' if machine.cores == 1 else 'cores'}"
    yield f"torch {machine.torch}"
    yield f"Python {machine.python}"
    yield f"memdlm {report.version}"
    yield report.date


def _configurations(report: Report) -> Iterator[tuple[str, str]]:
    """Yield each configuration once: (model and seeds, configuration as text)."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for row in report.models:
        seeds.setdefault((row.model, _json(row.config)), []).append(str(row.seed))
    for (model, settings), each in seeds.items():
        yield f"{model}, {'seed' if len(each) == 1 else 'seeds'} {', '.join(each)}", settings


def percent(share: float) -> str:
    """Return a share in percent, with one decimal."""
    return f"{100 * share:.1f}"


def span(values: Sequence[int]) -> str:
    """Return the first and the last of ascending values, as text."""
    return " to ".join(f"{value:,}" for value in dict.fromkeys((values[0], values[-1])))


def duration(seconds: float) -> str:
    """Return a time in seconds, or in minutes from 90 seconds on, as text."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.1f} seconds"


def css_string(value: object) -> str:
    """Return a text as a CSS string; every character that could end it is written as its number."""
    return '"' + "".join(each if each.isalnum() or each == " " else f"\\{ord(each):x} " for each in str(value)) + '"'


def _picture(draw: Draw, part: Part, size: tuple[float, float]) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(draw, part, size=size)).decode()


def _json(value: Any) -> str:
    return json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False)


_ENVIRONMENT = Environment(
    loader=PackageLoader("memdlm", "report/templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.filters |= {"percent": percent, "css": css_string}
_ENVIRONMENT.globals |= {
    "generator": GENERATOR,
    "RECALL": RECALL,
    "OPEN_BOOK": OPEN_BOOK,
    "BIAS_PANELS": BIAS_PANELS,
    "NARROW": NARROW,
    "WIDE": WIDE,
    "one_digit": "{:.1f}".format,
    "two_digits": "{:.2f}".format,
    "json": _json,
    "picture": _picture,
} | {
    each.__name__: each
    for each in (
        *(percent, span, duration, multiple),
        *(accuracy_rows, bias_rows, cost_rows, logged_series, mean_losses, training_rows, training_series),
        *(accuracy_by_length, logged_losses, recalled, training_curves, training_losses),
    )
}
