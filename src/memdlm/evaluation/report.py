"""The report of a demo: numbers as JSON, three figures, and one HTML page to look at and pass on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdlm.errors import DataError
from memdlm.evaluation.report_data import check_report, summary_rows
from memdlm.evaluation.report_figures import BIAS_PANELS, accuracy_by_length, png, training_curves
from memdlm.evaluation.report_page import page

__all__ = ["summary_rows", "write_report"]


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.json, three PNGs and report.html into `folder` and return their paths.

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
        "report.html": page(data).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"The report folder {folder} is, or lies under, a file. Name another folder.") from error
    return _replace_all(contents, folder)


def _replace_all(contents: Mapping[str, bytes], folder: Path) -> list[Path]:
    finished = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for temporary, content in zip(finished.values(), contents.values(), strict=True):
            temporary.write_bytes(content)
        for path, temporary in finished.items():
            os.replace(temporary, path)
    finally:
        for temporary in finished.values():
            temporary.unlink(missing_ok=True)
    return list(finished)
