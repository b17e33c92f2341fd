"""The first lines of a demo's page: what it found, in one sentence of its own numbers, whatever the outcome."""

from memdlm.report.model import Recall
from memdlm.report.tables import AccuracyRow, accuracy_rows


def finding(part: Recall) -> str:
    """Return what the model with the best memory answers at the training length; "" before anything was measured."""
    means = {(row.model, row.memory): at_training_length(row, part) for row in accuracy_rows(part)}
    shares = {model: share for (model, memory), share in means.items() if memory and share is not None}
    if not shares:
        return ""
    best = max(shares, key=lambda model: shares[model])
    without = means[best, False]
    guess = "" if part.task.chance is None else f" Guessing gives {_percent(part.task.chance)}."
    return (
        f"Asked about facts that it can no longer see, the model \N{LEFT DOUBLE QUOTATION MARK}{best}"
        f"\N{RIGHT DOUBLE QUOTATION MARK} answers {_percent(shares[best])} of the questions right from its memory, and "
        f"{_percent(0.0 if without is None else without)} with the memory switched off.{guess}"
    )


def at_training_length(row: AccuracyRow, part: Recall) -> float | None:
    """Return a row's mean accuracy at the training length; None if that was not measured."""
    return next((cell.mean for cell in row.cells if cell.length == part.task.train_length), None)


def _percent(share: float) -> str:
    text = f"{100 * share:.1f}".removesuffix(".0")
    return f"{text} %"
