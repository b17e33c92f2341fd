"""Replay a denoising: one self-contained HTML page; a token's colour shows the step that committed it."""

import json
from typing import final

from torch import Tensor

from memdlm.diffusion.sampling import Step
from memdlm.inference import Job
from memdlm.report.pages import render


@final
class Trace:
    """Collects the steps of a job; `page` renders them."""

    def __init__(self, job: Job) -> None:
        self.job, self.tokenizer = job, job.decoder.tokenizer
        self.ends = job.canvas.response_ends.tolist()
        self.steps: list[list[tuple[int, int, str, float, int]]] = []

    def add(self, step: Step) -> None:
        """Record what a step committed and replaced."""
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
        """Return the HTML page."""
        canvas = self.job.canvas
        is_open = canvas.is_open.cpu()
        rows = [
            [None if is_open[row, column] else self._text(ids[column]) for column in range(end)]
            for row, (ids, end) in enumerate(zip(canvas.ids.cpu(), self.ends, strict=True))
        ]
        total = sum(text is None for row in rows for text in row)
        data = {"rows": rows, "steps": self.steps, "blank": "\u00a0" * 4, "total": total}
        # "</script>" inside a token must not end the script.
        return render("trace.html.j2", title=title, data=json.dumps(data).replace("<", "\\u003c"))

    def _text(self, token: Tensor) -> str:
        return str(self.tokenizer.decode([int(token)]))
