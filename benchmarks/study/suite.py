"""What a memory that learned to be written can hold: one command, every task, every seed.

    python benchmarks/study/suite.py --seeds 0 --out benchmarks/study/results/suite.json
    python benchmarks/study/suite.py --tasks "32 facts, rank 32" --seeds 0 1 2

A task counts as solved where the mean over its seeds is at least 97 % at the training length. Rows are written as they
are measured; tasks and seeds that the file already has are not run again.
"""

import argparse
import json
import platform
import statistics
from datetime import date
from pathlib import Path

import torch
from recall_suite import suite

from memdlm.workflows.studies.plans import OURS, arms
from memdlm.workflows.studies.recall_study import recall_data, run_arm

SOLVED = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(suite()), choices=list(suite()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/suite.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    found |= {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
    for name in arguments.tasks:
        plan = suite()[name]
        data = recall_data(plan)
        for seed in arguments.seeds:
            if any((row["task"], row["seed"]) == (name, seed) for row in found["rows"]):
                continue
            row = {"task": name, "chance": plan.task.chance, **run_arm(plan, data, arms(plan)[OURS], seed)}
            found["rows"].append(row)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, "seed", seed, *(f"{a['length']}:{a['accuracy']:.3f}" for a in row["accuracy"] if a["memory"]))
    print(markdown(found["rows"]))


def markdown(rows: list[dict]) -> str:
    """Return a table: every seed at the training length and beyond, and whether the task is solved."""
    out = ["| task | chance | training length | 4 times | memory off | CPU s | solved |", "|---" * 7 + "|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        lengths = sorted({a["length"] for row in own for a in row["accuracy"]})

        def seen(length: int, is_on: bool, own: list[dict] = own) -> list[float]:
            return [a["accuracy"] for r in own for a in r["accuracy"] if (a["length"], a["memory"]) == (length, is_on)]

        columns = [seen(lengths[0], True), seen(lengths[-1], True), seen(lengths[0], False)]
        cells = [", ".join(f"{value:.3f}" for value in values) for values in columns]
        seconds = statistics.fmean(row["cpu_seconds"] for row in own)
        is_solved = "yes" if statistics.fmean(columns[0]) >= SOLVED else "no"
        out.append(f"| {task} | {own[0]['chance']:.3f} | " + " | ".join(cells) + f" | {seconds:.0f} | {is_solved} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
