"""What studies share: rows in a JSON file, conversations for choices, and a plan so small that it says nothing."""

import dataclasses
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from memdlm.data.synthetic import KeyValueRecall
from memdlm.workflows.studies.plans import RecallPlan

SMOKE: dict[str, Any] = {
    "task": KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=4, num_questions=2, is_adjacent=True),
    "train_length": 8,
    "num_eval": 2,
    "batch_size": 4,
}
"""Changes of a plan under which everything runs, and nothing is learned."""
SMOKE_STEPS = 2


class Rows:
    """The rows of one file. A row is on the disk as soon as it is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self.found |= {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}

    def where(self, **key: Any) -> list[dict[str, Any]]:
        """Return the rows that have all these values."""
        return [row for row in self.found["rows"] if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep one more row, and return it as the file has it."""
        kept: dict[str, Any] = json.loads(json.dumps(row))
        self.found["rows"].append(kept)
        self._save()
        return kept

    def drop(self, **key: Any) -> None:
        """Forget the rows that have all these values."""
        gone = self.where(**key)
        self.found["rows"] = [row for row in self.found["rows"] if row not in gone]
        self._save()

    def _save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def on_validation(plan: RecallPlan) -> RecallPlan:
    """Return the plan with other conversations to be measured on: those that choices are made on."""
    return dataclasses.replace(plan, draws={**plan.draws, "held out": "study validation"})
