"""The report of a demo: numbers as JSON, figures, and one self-contained HTML page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdlm.files import replace_files
from memdlm.report.figures import BIAS_PANELS, accuracy_by_length, png, training_curves, training_losses
from memdlm.report.model import check_report
from memdlm.report.pages import page
from memdlm.report.records import plain


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.json, report.html and the figures as PNGs into `folder` and return their paths.

    There are three figures, and two more if the report has a part `recall`. Lists of the report may be empty; the page
    then says what is missing. Everything is made before the first file is touched, and files are replaced whole, so
    that a failure leaves an earlier report as it was. The same report gives the same bytes.
    """
    found = check_report(report)
    bias = [(panel.title, panel.draw) for panel in BIAS_PANELS]
    contents = {
        "report.json": json.dumps(plain(found), indent=2, sort_keys=True, allow_nan=False).encode() + b"\n",
        "accuracy_by_length.png": png([("Accuracy by length (dots: single seeds)", accuracy_by_length)], found),
        "training_curves.png": png([("Evaluation loss (thin: single seeds)", training_curves)], found),
        "exposure_bias.png": png(bias, found, size=(11.5, 3.7)),
    }
    if found.recall is not None:
        alone = "Accuracy from memory alone (dots: single seeds)"
        contents["recall_by_length.png"] = png([(alone, accuracy_by_length)], found.recall)
        losses = "Training loss (thin: single seeds)"
        contents["recall_losses.png"] = png([(losses, training_losses)], found.recall)
    contents["report.html"] = page(found).encode()
    paths = [folder / name for name in contents]
    replace_files(dict(zip(paths, contents.values(), strict=True)))
    return paths
