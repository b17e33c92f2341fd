"""What a memory that learned to be written can hold: one command, every task, every seed.

    python benchmarks/study/suite.py --seeds 0 --out benchmarks/study/results/suite.json
    python benchmarks/study/suite.py --tasks "32 facts, rank 32" --seeds 0 1 2
    python benchmarks/study/suite.py --variants all --tasks "several values per key" --validation --out /tmp/v.json

A task counts as solved where the mean over its seeds is at least 97 % at the training length. `--variants` runs other
memories than the recall preset's, each with one change. Choices are made with `--validation`, on other conversations.
Rows are written as they are measured; tasks, variants and seeds that the file already has are not run again. `--smoke`
runs everything asked for in a tiny size; its figures say nothing.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from recall_suite import suite
from study_rows import SMOKE_STEPS, Rows, on_validation
from variants import PRESET, VARIANTS

from memdlm.workflows.studies.plans import RecallPlan
from memdlm.workflows.studies.recall_study import recall_data, run_arm

SOLVED = 0.97


def plan_of(task: str, *, validation: bool, smoke: bool) -> RecallPlan:
    plan = suite()[task]
    if smoke:
        plan = dataclasses.replace(plan, steps=SMOKE_STEPS, num_train=8, num_eval=2, batch_size=4, rank=2)
    return on_validation(plan) if validation else plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(suite()), choices=list(suite()))
    parser.add_argument("--variants", nargs="+", default=[PRESET], choices=[*VARIANTS, "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--validation", action="store_true", help="other conversations, for choices")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/suite.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    names = list(VARIANTS) if arguments.variants == ["all"] else arguments.variants
    for task in arguments.tasks:
        usual = plan_of(task, validation=arguments.validation, smoke=arguments.smoke)
        # No variant changes the conversations.
        data = recall_data(usual)
        for name in names:
            plan, config = VARIANTS[name].applied(usual)
            for seed in arguments.seeds:
                if any(variant_of(row) == name for row in rows.where(task=task, seed=seed)):
                    continue
                key = {"task": task, "variant": name, "chance": plan.task.chance}
                row = rows.add(key | run_arm(plan, data, config, seed))
                figures = (f"{a['length']}:{a['accuracy']:.3f}" for a in row["accuracy"] if a["memory"])
                print(f"{task}, {name}, seed {seed}", *figures, flush=True)
    print(markdown(rows.found["rows"]))


def variant_of(row: dict[str, Any]) -> str:
    """Return the variant of a row; rows of before there were any have none."""
    return row.get("variant", PRESET)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table: every seed at the training length and beyond, and whether the task is solved."""
    heads = ["task", "variant", "chance", "training length", "4 times", "memory off", "CPU s", "solved"]
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task, variant in dict.fromkeys((row["task"], variant_of(row)) for row in rows):
        own = [row for row in rows if (row["task"], variant_of(row)) == (task, variant)]
        lengths = sorted({a["length"] for row in own for a in row["accuracy"]})

        def seen(length: int, is_on: bool, own: list[dict[str, Any]] = own) -> list[float]:
            return [a["accuracy"] for r in own for a in r["accuracy"] if (a["length"], a["memory"]) == (length, is_on)]

        columns = [seen(lengths[0], True), seen(lengths[-1], True), seen(lengths[0], False)]
        cells = [", ".join(f"{value:.3f}" for value in values) for values in columns]
        seconds = statistics.fmean(row["cpu_seconds"] for row in own)
        is_solved = "yes" if statistics.fmean(columns[0]) >= SOLVED else "no"
        shown = [task, variant, f"{own[0]['chance']:.3f}", *cells, f"{seconds:.0f}", is_solved]
        out.append(f"| {' | '.join(shown)} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
