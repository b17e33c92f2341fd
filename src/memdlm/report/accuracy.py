"""The table and the figure of accuracy by length, for a whole report or a part of one."""

from html import escape

from memdlm.report.data import Report, Row, accuracy_rows
from memdlm.report.figures import accuracy_by_length, multiple
from memdlm.report.html import figure, missing, numbers, percent, span, table, who


def accuracy_section(report: Report, *, shows_seeds: bool = False) -> str:
    """Per model, memory off and on, one column per length; `shows_seeds` writes every seed's value into its cell."""
    rows = accuracy_rows(report)
    if not rows:
        return missing("Accuracy")
    task = report["task"]
    head = ["model", "memory"] + [
        f"{cell['length']}<small>{multiple(cell['length'], task['train_length'])}</small>" for cell in rows[0]["cells"]
    ]
    body = [[*who(row), *(_cell(cell, shows_seeds=shows_seeds) for cell in row["cells"])] for row in rows]
    questions = sorted({row["questions"] for row in report["accuracy"]})
    seeds = (
        "The small figures are the single seeds'."
        if shows_seeds
        else "The value of each seed shows when the pointer rests on a cell."
    )
    caption = (
        "Percent of questions answered correctly, mean over seeds, by length; below each length its multiple "
        f"of the training length, {task['train_length']}. &plusmn; is half the range where there are two "
        f"seeds and the standard deviation where there are three or more. {seeds} "
        f"{span(questions)} questions per cell and seed. "
        f"Chance is {percent(task['chance'])} %. "
        "&ldquo;No baseline&rdquo;: measured with memory, but not without, so it is not compared."
    )
    drawn = figure(
        report,
        accuracy_by_length,
        name="Accuracy by length",
        caption="Lines are means over seeds, dots are single seeds. Dashed lines with hollow markers: with "
        "inference-time memory. Grey dashed line: chance. Lines stand slightly apart sideways so that equal "
        "values stay visible.",
    )
    is_comparable = any(cell["values"] for row in rows for cell in row["cells"])
    return table(caption, head, body, num_text=2) + (f"\n{drawn}" if is_comparable else "")


def _cell(cell: Row, *, shows_seeds: bool) -> str:
    if not cell["values"]:
        return f'<td class="missing">{escape(cell["note"])}</td>'
    notes = [", ".join(percent(value) for value in cell["values"])] if shows_seeds else []
    notes += [escape(cell["note"])] if cell["note"] else []
    return numbers(cell["values"], cell["seeds"], percent, "".join(f"<small>{note}</small>" for note in notes))
