"""The longer recall study (`benchmarks/study/long.py`), one model a job: as many as the seconds allow; and English.

    python benchmarks/gpu/study.py

It takes more than one part's time: each further call goes on. A job starts only in the first half of the seconds, as
one may take minutes. English (`benchmarks/study/english.py`, and `dictionary.py` where the dictionary is installed) is
trained at 100 million parameters for as long as a job may take; an hour's training is a call of those scripts.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from card import Card, arguments, card_of, run_part

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

from dictionary import Dictionary, is_installed
from english import English
from long import measured, plan_of, smoke
from pages import Corpus
from reading import ARMS, Run, run

from memdlm.workflows.studies.plans import MAIN, RecallPlan
from memdlm.workflows.studies.recall_study import recall_data

SIZES = ("12M", "80M")
READING_SECONDS = 170
"""Of a training in a job. With its trials, its curve and its measures a job stays within what a part may take."""


def job(plan: RecallPlan, arm: str) -> dict[str, Any]:
    return measured(plan, recall_data(plan), arm, seed=0)


def reading(card: Card, make: Callable[..., Corpus], arm: str) -> dict[str, Any]:
    """Train and measure one network on English; a quick one takes four steps."""
    corpus = make(is_tiny=card.is_quick)
    if card.is_quick:
        return run(Run(corpus=corpus, size="smoke", arm=arm, seed=0, pages=4), steps=4)
    return run(Run(corpus=corpus, size="100M", arm=arm, seed=0, device=str(card.device)), seconds=READING_SECONDS)


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
    corpora = [English, *([Dictionary] if is_installed() else [])]
    jobs |= {f"{make.name}, 100M, {arm}": partial(reading, card, make, arm) for make in corpora for arm in ARMS}
    return run_part("study", jobs, options, {"seed": 0})


if __name__ == "__main__":
    raise SystemExit(main())
