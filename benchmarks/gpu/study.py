"""The longer recall study (`benchmarks/study/long.py`), one model a job: as many as the seconds allow.

    python benchmarks/gpu/study.py

It takes more than one part's time: each further call goes on. A job starts only in the first half of the seconds, as
one may take minutes.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

from card import arguments, card_of, run_part

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

from long import measured, plan_of, smoke

from memdlm.workflows.studies.plans import MAIN, RecallPlan
from memdlm.workflows.studies.recall_study import recall_data

SIZES = ("12M", "80M")


def job(plan: RecallPlan, arm: str) -> dict[str, Any]:
    return measured(plan, recall_data(plan), arm, seed=0)


def main() -> int:
    options = arguments("study", __doc__, budget=240)
    card = card_of(options)
    plans = {"smoke": smoke()} if card.is_quick else {size: plan_of(size) for size in SIZES}
    if not card.is_cuda and not card.is_quick:
        raise SystemExit("study: on the CPU it runs with --quick only.")
    jobs = {
        f"{size}, {reach}, {arm}": partial(job, own, arm)
        for size, plan in plans.items()
        for reach, own in (("window", plan), ("open book", dataclasses.replace(plan, window=None)))
        for arm in MAIN
    }
    return run_part("study", jobs, options, {"seed": 0})


if __name__ == "__main__":
    raise SystemExit(main())
