"""The page of a report: one HTML file that needs no other, for a screen, a phone, or paper."""

import base64
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape

from memdlm.evaluation.report_data import Report, Row, bias_rows, model_names, spread, summary_rows
from memdlm.evaluation.report_figures import (
    BIAS_PANELS,
    NARROW,
    WIDE,
    Draw,
    accuracy_by_length,
    multiple,
    svg,
    training_curves,
)

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #fff; --box: #f6f8fa }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b3; --line: #3d444d; --page: #0d1117; --box: #161b22 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p, li, figcaption { max-width: 46rem }
.facts, .missing, .caption, figcaption, small { color: var(--soft) }
.facts { margin: 0 0 1rem; max-width: none }
.facts span { white-space: nowrap }
.caption { font-size: .88rem; margin: -.2rem 0 1rem }
.notes { margin: 1rem 0; max-width: 46rem; padding: .7rem 1rem .7rem 2.2rem; background: var(--box);
  border-left: 4px solid #0072b2; border-radius: 4px }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .38rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap }
thead th { border-bottom-width: 2px; vertical-align: bottom }
th[scope=row], th.text, td.text { text-align: left }
th small, td small { display: block; font-weight: normal }
tr.first > * { border-bottom-style: dotted }
figure { margin: .8rem 0 1.4rem }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: 6px }
figure.one img { max-width: 46rem }
figcaption { font-size: .88rem; margin-top: .5rem }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18.5rem), 1fr)) }
.panels figure { margin: 0 }
.panels h3 { font-size: .95rem; margin: 0 0 .4rem }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem }
summary { cursor: pointer }
pre { overflow-x: auto; padding: .8rem; margin: .6rem 0; background: var(--box); border-radius: 6px;
  font: .88rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
@media (max-width: 34rem) {
  body { padding: 1rem .8rem 2rem }
  h1 { font-size: 1.35rem }
  th, td { padding: .34rem .45rem; font-size: .88rem }
  th { white-space: normal }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt }
  h2 { break-after: avoid }
  figure.one img { max-width: 5.5in }
  figure, tr, .notes, .panels > div { break-inside: avoid }
  .scroll, pre { overflow: visible }
  pre { white-space: pre-wrap }
  details::details-content { content-visibility: visible; height: auto }
}
"""

_NOT_MEASURED = "not measured: interrupted before the first result"
_DOT = " \N{MIDDLE DOT} "


def page(report: Report) -> str:
    """The whole page for a checked report."""
    sections = (
        ("Accuracy by length", _accuracy(report)),
        ("Training", _training(report)),
        ("Exposure bias", _exposure_bias(report)),
        ("Cost", _cost(report)),
        ("Configuration", _configuration(report)),
        ("How to reproduce", _reproduce(report)),
    )
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{content}\n</section>" for title, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report['title'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n{_top(report)}\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _top(report: Report) -> str:
    machine, task = report["machine"], report["task"]
    steps = sorted({row["steps"] for row in report["models"]})
    seeds = ", ".join(map(str, report["seeds"]))
    facts = [
        "quick run" if report["quick"] else "",
        f"{'seed' if len(report['seeds']) == 1 else 'seeds'} {seeds}" if seeds else "",
        f"{_span(steps)} training steps" if steps else "",
        _duration(report["seconds"]["total"]),
        f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'}",
        f"torch {machine['torch']}",
        f"Python {machine['python']}",
        f"memdlm {report['version']}",
        report["date"],
    ]
    lines = [
        f"<h1>{escape(report['title'])}</h1>",
        f'<p class="facts">{_DOT.join(f"<span>{escape(fact)}</span>" for fact in facts if fact)}</p>',
        f"<p><strong>Task: {escape(task['name'])}.</strong> {escape(task['description'])}</p>",
    ]
    if report["notes"]:
        items = "\n".join(f"<li>{escape(note)}</li>" for note in report["notes"])
        lines.append(f'<ul class="notes">\n{items}\n</ul>')
    return "\n".join(lines)


def _accuracy(report: Report) -> str:
    rows = summary_rows(report)
    if not rows:
        return _missing("Accuracy")
    task = report["task"]
    head = ["model", "memory"] + [
        f"{cell['length']}<small>{multiple(cell['length'], task['train_length'])}</small>" for cell in rows[0]["cells"]
    ]
    body = [[*_who(row), *(_accuracy_cell(cell) for cell in row["cells"])] for row in rows]
    questions = sorted({row["questions"] for row in report["accuracy"]})
    caption = (
        "Percent of questions answered correctly, mean over seeds, by length; below each length its multiple "
        f"of the training length, {task['train_length']}. &plusmn; is half the range where there are two "
        "seeds and the standard deviation where there are three or more. The value of each seed shows when "
        f"the pointer rests on a cell. {_span(questions)} questions per cell and seed. "
        f"Chance is {_percent(task['chance'])} %. "
        "&ldquo;No baseline&rdquo;: measured with memory, but not without, so it is not compared."
    )
    figure = _figure(
        report,
        accuracy_by_length,
        name="Accuracy by length",
        caption="Lines are means over seeds, dots are single seeds. Dashed lines with hollow markers: with "
        "inference-time memory. Grey dashed line: chance. Lines stand slightly apart sideways so that equal "
        "values stay visible.",
    )
    is_comparable = any(cell["values"] for row in rows for cell in row["cells"])
    return _table(caption, head, body, num_text=2) + (f"\n{figure}" if is_comparable else "")


def _accuracy_cell(cell: Row) -> str:
    note = f"<small>{escape(cell['note'])}</small>" if cell["values"] and cell["note"] else ""
    if not cell["values"]:
        return f'<td class="missing">{escape(cell["note"])}</td>'
    return _numbers(cell["values"], cell["seeds"], _percent, note)


def _training(report: Report) -> str:
    if not any(row["curve"]["eval_nll"] for row in report["models"]):
        return _missing("Evaluation loss during training")
    return _figure(
        report,
        training_curves,
        name="Evaluation loss over training steps",
        caption="Solid: evaluation loss without memory, for every model; thick is the mean over seeds, thin "
        "are single seeds. Dashed: the loss with memory. It is not comparable with the solid lines, because "
        "in the published recipe the memory has seen the labels that the loss scores.",
    )


def _exposure_bias(report: Report) -> str:
    rows = bias_rows(report)
    if not any(row["seeds"] or row["note"] == "no baseline" for row in rows):
        return _missing("Exposure bias")
    panels = "\n".join(
        f"<div>\n<h3>{escape(panel.title)}</h3>\n"
        + _figure(report, panel.draw, name=panel.title, caption=panel.caption, sizes=(NARROW,))
        + "\n</div>"
        for panel in BIAS_PANELS
    )
    names = ("max_ratio", "max_matched", "sequential", "static")
    body = []
    for row in rows:
        cells = [_numbers(row[name], row["seeds"], lambda value: f"{value:.2f}") for name in names]
        if not row["seeds"]:
            cells = [f'<td class="missing">{escape(row["note"])}</td>'] + ["<td></td>"] * 3
        elif row["note"]:
            cells[0] = cells[0].replace("</td>", f"<small>{escape(row['note'])}</small></td>")
        body.append([*_who(row), *cells])
    head = ["model", "memory", "max ratio", "max matched ratio", "mean sequential", "mean static"]
    caption = (
        "Ratios: the largest over the decoding steps; losses: the mean over them, in nats per token; then "
        "the mean over seeds, &plusmn; as above. The ratio of two losses near zero is mostly noise: read it "
        "beside the losses."
    )
    is_comparable = any(row["seeds"] for row in rows)
    drawn = f'<div class="panels">\n{panels}\n</div>\n' if is_comparable else ""
    return drawn + _table(caption, head, body, num_text=2)


def _cost(report: Report) -> str:
    seconds = {name: value for name, value in report["seconds"].items() if name != "total"}
    phases = "; ".join(f"{escape(name)} {_duration(value)}" for name, value in seconds.items())
    total = f"<p>In all {_duration(report['seconds']['total'])}{f': {phases}' if phases else ''}.</p>"
    if not report["models"]:
        return _missing("The cost of training") + total
    body = []
    for model in model_names(report):
        mine = sorted((row for row in report["models"] if row["model"] == model), key=lambda row: row["seed"])
        seeds = [row["seed"] for row in mine]
        name = f'<th scope="row">{escape(model)}</th>'
        if not mine:
            body.append([name, '<td class="missing">not measured</td>', *["<td></td>"] * 3])
            continue
        per_step = [1000 * row["seconds"] / row["steps"] if row["steps"] else None for row in mine]
        body.append(
            [
                name,
                f"<td>{_span(sorted({row['parameters'] for row in mine}))}</td>",
                f"<td>{_span(sorted({row['steps'] for row in mine}))}</td>",
                _numbers([row["seconds"] for row in mine], seeds, lambda value: f"{value:.1f}"),
                _numbers(per_step, seeds, lambda value: f"{value:.1f}"),
            ]
        )
    head = ["model", "parameters", "training steps", "seconds", "milliseconds per step"]
    caption = "Training of one model on one seed: mean over seeds, &plusmn; as above."
    return _table(caption, head, body, num_text=1) + "\n" + total


def _configuration(report: Report) -> str:
    blocks: dict[str, list[str]] = {}
    for row in report["models"]:
        settings = json.dumps(row["config"], indent=2, sort_keys=True, ensure_ascii=False)
        blocks.setdefault(f"{row['model']}\n{settings}", []).append(str(row["seed"]))
    folded = []
    for key, seeds in blocks.items():
        model, settings = key.split("\n", 1)
        folded.append(_fold(f"{model}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}", settings))
    if not folded:
        folded.append(_missing("The configuration of the models"))
    machine = json.dumps(report["machine"], indent=2, sort_keys=True, ensure_ascii=False)
    task = json.dumps(report["task"], indent=2, sort_keys=True, ensure_ascii=False)
    return "\n".join([*folded, _fold("task", task), _fold("machine", machine)])


def _reproduce(report: Report) -> str:
    return (
        f"<pre><code>{escape(report['command'])}</code></pre>\n"
        f"<p>With memdlm {escape(report['version'])}. The numbers of this page, and those behind its "
        "figures, are in report.json beside it.</p>"
    )


def _missing(what: str) -> str:
    return f'<p class="missing">{what} was {_NOT_MEASURED}.</p>'


def _fold(title: str, text: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre>\n</details>"


def _figure(
    report: Report,
    draw: Draw,
    *,
    name: str,
    caption: str,
    sizes: Sequence[tuple[float, float]] = (WIDE, NARROW),
) -> str:
    """The figure as embedded SVG; a second size is what a phone gets."""
    wide, *narrow = [
        "data:image/svg+xml;base64," + base64.b64encode(svg(draw, report, size=size)).decode() for size in sizes
    ]
    sources = "".join(f'<source media="(max-width: 34rem)" srcset="{one}">\n' for one in narrow)
    return (
        f"<figure{' class=one' if narrow else ''}>\n<picture>\n{sources}"
        f'<img src="{wide}" alt="{escape(name)}">\n</picture>\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _table(caption: str, head: Iterable[str], body: Iterable[Sequence[str]], *, num_text: int) -> str:
    """A table that scrolls sideways on a phone; the cells are HTML, the first `num_text` columns words."""
    columns = "".join(
        f'<th scope="col"{" class=text" if index < num_text else ""}>{name}</th>' for index, name in enumerate(head)
    )
    rows = "\n".join(f"<tr{' class=first' if '>off<' in row[1] else ''}>{''.join(row)}</tr>" for row in body)
    return (
        f'<div class="scroll">\n<table>\n<thead><tr>{columns}</tr></thead>\n'
        f'<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n<p class="caption">{caption}</p>'
    )


def _who(row: Row) -> tuple[str, str]:
    memory = "on" if row["memory"] else "off"
    return f'<th scope="row">{escape(row["model"])}</th>', f'<td class="text">{memory}</td>'


def _numbers(values: Sequence[float | None], seeds: Sequence[int], show: Callable[[float], str], note: str = "") -> str:
    """A cell with the mean and spread over seeds, and every seed's value as its tooltip."""
    each = "; ".join(
        f"seed {seed}: {'undefined' if value is None else show(value)}"
        for seed, value in zip(seeds, values, strict=True)
    )
    known = [value for value in values if value is not None]
    if not known:
        return f'<td title="{escape(each)}">undefined{note}</td>'
    if len(known) < len(values):
        note = f"<small>{len(values) - len(known)} of {len(values)} undefined</small>{note}"
    apart = spread(known)
    text = show(statistics.fmean(known)) + ("" if apart is None else f" &plusmn; {show(apart)}")
    return f'<td title="{escape(each)}">{text}{note}</td>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _span(values: Sequence[int]) -> str:
    ends = [f"{value:,}" for value in dict.fromkeys((values[0], values[-1]))]
    return " to ".join(ends)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.1f} seconds"
