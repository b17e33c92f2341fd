"""Pieces of a report's page: the style, tables, figures and numbers as HTML that needs no other file."""

import base64
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape

from memdlm.outputs import GENERATOR
from memdlm.report.data import Report, Row, spread
from memdlm.report.figures import NARROW, WIDE, Draw, svg

STYLE = """
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
thead th { border-bottom-width: 2px; vertical-align: bottom; white-space: normal }
th[scope=row], th.text, td.text { text-align: left }
th small, td small { display: block; font-weight: normal }
tr.first > * { border-bottom-style: dotted }
figure { margin: .8rem 0 1.4rem }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: 6px }
figure.one img { max-width: 46rem }
figcaption { font-size: .88rem; margin-top: .5rem }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.words { display: flex; flex-wrap: wrap; gap: .35rem; margin: .7rem 0 }
.word { min-width: 3.4rem; padding: .1rem .35rem .3rem; background: var(--box); border-radius: 4px; font-size: .84rem }
.word.asked { font-weight: bold }
.word i { display: block; height: 4px; min-width: 1px; margin-top: 2px; background: #8c959f }
.word i.after { background: #d55e00 }
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
DOT = " \N{MIDDLE DOT} "


def document(title: str, header: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole page: a header and titled sections, all HTML but the titles."""
    body = "\n".join(f"<section>\n<h2>{escape(name)}</h2>\n{content}\n</section>" for name, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{GENERATOR}\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n{header}\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def missing(what: str) -> str:
    """A sentence where a section has nothing to show."""
    return f'<p class="missing">{what} was {_NOT_MEASURED}.</p>'


def fold(title: str, text: str) -> str:
    """A text that opens on a click."""
    return f"<details>\n<summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre>\n</details>"


def figure(
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


def table(caption: str, head: Iterable[str], body: Iterable[Sequence[str]], *, num_text: int) -> str:
    """A table that scrolls sideways on a phone; the cells are HTML, the first `num_text` columns words."""
    columns = "".join(
        f'<th scope="col"{" class=text" if index < num_text else ""}>{name}</th>' for index, name in enumerate(head)
    )
    rows = "\n".join(f"<tr{' class=first' if '>off<' in row[1] else ''}>{''.join(row)}</tr>" for row in body)
    return (
        f'<div class="scroll">\n<table>\n<thead><tr>{columns}</tr></thead>\n'
        f'<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n<p class="caption">{caption}</p>'
    )


def who(row: Row) -> tuple[str, str]:
    """The two cells that name a row: model, and memory on or off."""
    memory = "on" if row["memory"] else "off"
    return f'<th scope="row">{escape(row["model"])}</th>', f'<td class="text">{memory}</td>'


def numbers(values: Sequence[float | None], seeds: Sequence[int], show: Callable[[float], str], note: str = "") -> str:
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


def percent(share: float) -> str:
    """A share in percent, one decimal."""
    return f"{100 * share:.1f}"


def span(values: Sequence[int]) -> str:
    """The first and the last of ascending values."""
    ends = [f"{value:,}" for value in dict.fromkeys((values[0], values[-1]))]
    return " to ".join(ends)


def duration(seconds: float) -> str:
    """Seconds, or minutes from 90 seconds on."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.1f} seconds"
