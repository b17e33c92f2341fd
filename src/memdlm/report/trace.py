"""A denoising played back: one self-contained HTML page, where colour is the step at which a token settled."""

import json
from html import escape
from typing import final

from torch import Tensor

from memdlm.diffusion.sampling import Step
from memdlm.inference import Job
from memdlm.outputs import GENERATOR

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #fff; --box: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b3; --line: #3d444d; --page: #0d1117; --box: #161b22 }
}
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: 0 0 .2rem }
.soft { color: var(--soft); font-size: .88rem; margin: 0 0 .8rem }
.bar { position: sticky; top: 0; display: flex; gap: .8rem; align-items: center; padding: .6rem 0;
  background: var(--page); border-bottom: 1px solid var(--line) }
.bar input[type=range] { flex: 1; min-width: 6rem }
button { font: inherit; padding: .15rem .9rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--box); color: var(--ink); cursor: pointer }
output { font-variant-numeric: tabular-nums; white-space: nowrap }
.row { margin: 1rem 0; padding: .8rem 1rem; background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.9 ui-monospace, Menlo, Consolas, monospace }
.row span { border-radius: 3px; padding: .1rem .12rem; margin: 0 .06rem }
.given { color: var(--soft) }
.open { color: transparent; background: repeating-linear-gradient(45deg, var(--line) 0 3px, transparent 3px 6px) }
.settled { color: #111 }
.new { outline: 2px solid var(--ink) }
.edited { text-decoration: underline wavy #b00020 }
.legend { display: inline-block; width: 9rem; height: .7rem; border-radius: 3px; vertical-align: middle }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent), last = data.steps.length;
// Five stops of a scale whose lightness rises evenly, light enough for dark text.
const stops = [[129,140,222],[95,176,214],[110,206,160],[180,222,108],[253,231,76]];
const colour = share => {
  const place = share * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2), part = place - low;
  const mix = [0,1,2].map(i => Math.round(stops[low][i] * (1 - part) + stops[low + 1][i] * part));
  return `rgb(${mix.join(",")})`;
};
const share = step => last > 1 ? (step - 1) / (last - 1) : 0;
const rows = document.getElementById("rows"), cells = data.rows.map(tokens => {
  const row = rows.appendChild(document.createElement("div"));
  row.className = "row";
  return tokens.map(text => {
    const cell = row.appendChild(document.createElement("span"));
    cell.dataset.given = text === null ? "" : "1";
    cell.dataset.text = text === null ? data.blank : text;
    row.appendChild(document.createElement("wbr"));
    return cell;
  });
});
const slider = document.getElementById("step"), label = document.getElementById("label");
const show = step => {
  slider.value = step;
  cells.forEach(row => row.forEach(cell => {
    cell.textContent = cell.dataset.text; cell.title = ""; cell.style.background = "";
    cell.className = cell.dataset.given ? "given" : "open";
  }));
  let settled = 0;
  data.steps.slice(0, step).forEach((changes, index) => changes.forEach(([row, column, text, sure, edited]) => {
    const cell = cells[row][column];
    if (!edited) settled += 1;
    cell.textContent = text;
    cell.className = "settled" + (edited ? " edited" : "") + (index + 1 === step ? " new" : "");
    cell.style.background = colour(share(index + 1));
    cell.title = `step ${index + 1}, confidence ${sure.toFixed(3)}${edited ? ", edited" : ""}`;
  }));
  label.textContent = `step ${step} of ${last}, ${settled} of ${data.total} tokens`;
};
let timer = null;
const play = document.getElementById("play");
const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
play.onclick = () => {
  if (timer) return stop();
  if (+slider.value >= last) show(0);
  play.textContent = "Pause";
  timer = setInterval(() => +slider.value >= last ? stop() : show(+slider.value + 1), Math.max(60, 6000 / last));
};
slider.max = last;
slider.oninput = () => { stop(); show(+slider.value); };
document.getElementById("legend").style.background =
  `linear-gradient(to right, ${[0, .25, .5, .75, 1].map(colour).join(",")})`;
// A step can be linked to: page.html#5.
show(location.hash ? Math.min(+location.hash.slice(1) || 0, last) : last);
"""


@final
class Trace:
    """Collects the steps of a job; `page` writes them down."""

    def __init__(self, job: Job) -> None:
        self.job, self.tokenizer = job, job.decoder.tokenizer
        self.ends = job.canvas.response_ends.tolist()
        self.steps: list[list[tuple[int, int, str, float, int]]] = []

    def add(self, step: Step) -> None:
        """Note what a step committed and replaced."""
        is_changed = (step.is_new | step.is_edited).cpu()
        ids, sure, edited = step.ids.cpu(), step.confidence.cpu(), step.is_edited.cpu()
        self.steps.append(
            [
                (
                    row,
                    column,
                    self._text(ids[row, column]),
                    round(float(sure[row, column]), 4),
                    int(edited[row, column]),
                )
                for row, column in is_changed.nonzero().tolist()
                if column < self.ends[row]
            ]
        )

    def page(self, title: str = "Denoising") -> str:
        """Return the page."""
        canvas = self.job.canvas
        is_open = canvas.is_open.cpu()
        rows = [
            [None if is_open[row, column] else self._text(ids[column]) for column in range(end)]
            for row, (ids, end) in enumerate(zip(canvas.ids.cpu(), self.ends, strict=True))
        ]
        total = sum(text is None for row in rows for text in row)
        data = {"rows": rows, "steps": self.steps, "blank": "\u00a0" * 4, "total": total}
        # "</script>" inside a token must not end the script.
        packed = json.dumps(data).replace("<", "\\u003c")
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="soft">Colour: the step at which a token settled, first <span class="legend" id="legend"></span> last.
Hover for the confidence. Grey text was given; a wavy line marks a token that was replaced.</p>
<div class="bar"><button id="play">Play</button><input type="range" id="step" min="0" aria-label="step">
<output id="label"></output></div>
<div id="rows"></div>
<script type="application/json" id="data">{packed}</script>
<script>{_SCRIPT}</script></body></html>
"""

    def _text(self, token: Tensor) -> str:
        return str(self.tokenizer.decode([int(token)]))
