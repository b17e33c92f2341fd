"""The page of a report: one HTML file that needs no other, for a screen, a phone, or paper."""

import json
from html import escape

from memdlm.evaluation.report_accuracy import accuracy_section
from memdlm.evaluation.report_data import Report, bias_rows, model_names
from memdlm.evaluation.report_figures import BIAS_PANELS, NARROW, training_curves
from memdlm.evaluation.report_html import DOT, document, duration, figure, fold, missing, numbers, span, table, who
from memdlm.evaluation.report_recall import TITLE, recall_section


def page(report: Report) -> str:
    """The whole page for a checked report."""
    sections = (
        *(((TITLE, recall_section(report["recall"])),) if "recall" in report else ()),
        ("Accuracy by length", accuracy_section(report)),
        ("Training", training_section(report)),
        ("Exposure bias", bias_section(report)),
        ("Cost", _cost(report)),
        ("Configuration", _configuration(report)),
        ("How to reproduce", _reproduce(report)),
    )
    return document(report["title"], _top(report), sections)


def _top(report: Report) -> str:
    machine, task = report["machine"], report["task"]
    steps = sorted({row["steps"] for row in report["models"]})
    seeds = ", ".join(map(str, report["seeds"]))
    facts = [
        "quick run" if report["quick"] else "",
        f"{'seed' if len(report['seeds']) == 1 else 'seeds'} {seeds}" if seeds else "",
        f"{span(steps)} training steps" if steps else "",
        duration(report["seconds"]["total"]),
        # Reports from before it was noted, all of CPUs, do not say it.
        machine.get("device", ""),
        f"{machine['cores']} {'core' if machine['cores'] == 1 else 'cores'}",
        f"torch {machine['torch']}",
        f"Python {machine['python']}",
        f"memdlm {report['version']}",
        report["date"],
    ]
    lines = [
        f"<h1>{escape(report['title'])}</h1>",
        f'<p class="facts">{DOT.join(f"<span>{escape(fact)}</span>" for fact in facts if fact)}</p>',
        f"<p><strong>Task: {escape(task['name'])}.</strong> {escape(task['description'])}</p>",
    ]
    if report["notes"]:
        items = "\n".join(f"<li>{escape(note)}</li>" for note in report["notes"])
        lines.append(f'<ul class="notes">\n{items}\n</ul>')
    return "\n".join(lines)


def training_section(report: Report) -> str:
    """Evaluation loss over training steps."""
    if not any(row["curve"]["eval_nll"] for row in report["models"]):
        return missing("Evaluation loss during training")
    return figure(
        report,
        training_curves,
        name="Evaluation loss over training steps",
        caption="Solid: evaluation loss without memory, for every model; thick is the mean over seeds, thin "
        "are single seeds. Dashed: the loss with memory. It is not comparable with the solid lines, because "
        "in the published recipe the memory has seen the labels that the loss scores.",
    )


def bias_section(report: Report) -> str:
    """Three panels and their table."""
    rows = bias_rows(report)
    if not any(row["seeds"] or row["note"] == "no baseline" for row in rows):
        return missing("Exposure bias")
    panels = "\n".join(
        f"<div>\n<h3>{escape(panel.title)}</h3>\n"
        + figure(report, panel.draw, name=panel.title, caption=panel.caption, sizes=(NARROW,))
        + "\n</div>"
        for panel in BIAS_PANELS
    )
    names = ("max_ratio", "max_matched", "sequential", "static")
    body = []
    for row in rows:
        cells = [numbers(row[name], row["seeds"], lambda value: f"{value:.2f}") for name in names]
        if not row["seeds"]:
            cells = [f'<td class="missing">{escape(row["note"])}</td>'] + ["<td></td>"] * 3
        elif row["note"]:
            cells[0] = cells[0].replace("</td>", f"<small>{escape(row['note'])}</small></td>")
        body.append([*who(row), *cells])
    head = ["model", "memory", "max ratio", "max matched ratio", "mean sequential", "mean static"]
    caption = (
        "Ratios: the largest over the decoding steps; losses: the mean over them, in nats per token; then "
        "the mean over seeds, &plusmn; as above. The ratio of two losses near zero is mostly noise: read it "
        "beside the losses."
    )
    is_comparable = any(row["seeds"] for row in rows)
    drawn = f'<div class="panels">\n{panels}\n</div>\n' if is_comparable else ""
    return drawn + table(caption, head, body, num_text=2)


def _cost(report: Report) -> str:
    seconds = {name: value for name, value in report["seconds"].items() if name != "total"}
    phases = "; ".join(f"{escape(name)} {duration(value)}" for name, value in seconds.items())
    total = f"<p>In all {duration(report['seconds']['total'])}{f': {phases}' if phases else ''}.</p>"
    if not report["models"]:
        return missing("The cost of training") + total
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
                f"<td>{span(sorted({row['parameters'] for row in mine}))}</td>",
                f"<td>{span(sorted({row['steps'] for row in mine}))}</td>",
                numbers([row["seconds"] for row in mine], seeds, lambda value: f"{value:.1f}"),
                numbers(per_step, seeds, lambda value: f"{value:.1f}"),
            ]
        )
    head = ["model", "parameters", "training steps", "seconds", "milliseconds per step"]
    caption = "Training of one model on one seed: mean over seeds, &plusmn; as above."
    return table(caption, head, body, num_text=1) + "\n" + total


def _configuration(report: Report) -> str:
    blocks: dict[str, list[str]] = {}
    for row in report["models"]:
        settings = json.dumps(row["config"], indent=2, sort_keys=True, ensure_ascii=False)
        blocks.setdefault(f"{row['model']}\n{settings}", []).append(str(row["seed"]))
    folded = []
    for key, seeds in blocks.items():
        model, settings = key.split("\n", 1)
        folded.append(fold(f"{model}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}", settings))
    if not folded:
        folded.append(missing("The configuration of the models"))
    machine = json.dumps(report["machine"], indent=2, sort_keys=True, ensure_ascii=False)
    task = json.dumps(report["task"], indent=2, sort_keys=True, ensure_ascii=False)
    return "\n".join([*folded, fold("task", task), fold("machine", machine)])


def _reproduce(report: Report) -> str:
    return (
        f"<pre><code>{escape(report['command'])}</code></pre>\n"
        f"<p>With memdlm {escape(report['version'])}. The numbers of this page, and those behind its "
        "figures, are in report.json beside it.</p>"
    )
