"""The report of a demo: numbers as JSON, figures, and one HTML page to look at and pass on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdlm.files import replace_files
from memdlm.report.data import check_report, summary_rows
from memdlm.report.figures import BIAS_PANELS, accuracy_by_length, png, training_curves
from memdlm.report.page import page
from memdlm.report.recall import training_losses

__all__ = ["summary_rows", "write_report"]


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.json, report.html and the figures as PNGs into `folder` and return their paths.

    There are three figures, and two more where the report has a part `recall`.
    Lists of the report may be empty: what they would show is then said to be missing. Everything is made
    before the first file is touched, and every file is replaced whole, so that a failure leaves an earlier
    report as it was. The same report gives the same bytes.
    """
    data = check_report(report)
    bias = [(panel.title, panel.draw) for panel in BIAS_PANELS]
    contents = {
        "report.json": json.dumps(data, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n",
        "accuracy_by_length.png": png([("Accuracy by length (dots: single seeds)", accuracy_by_length)], data),
        "training_curves.png": png([("Evaluation loss (thin: single seeds)", training_curves)], data),
        "exposure_bias.png": png(bias, data, size=(11.5, 3.7)),
    }
    if "recall" in data:
        part = data["recall"]
        contents |= {
            "recall_by_length.png": png(
                [("Accuracy from memory alone (dots: single seeds)", accuracy_by_length)], part
            ),
            "recall_losses.png": png([("Training loss (thin: single seeds)", training_losses)], part),
        }
    contents["report.html"] = page(data).encode()
    paths = [folder / name for name in contents]
    replace_files(dict(zip(paths, contents.values(), strict=True)))
    return paths
