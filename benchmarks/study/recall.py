"""Recall from memory alone: the main comparison and the ablation table, every seed shown.

    python benchmarks/study/recall.py --seeds 0 1 2 --arms all --out benchmarks/study/results/recall.json
    python benchmarks/study/recall.py --context dropped --seeds 0 1 2 3 4 5

With the context dropped the network sees questions alone, in training too, and attention is not limited: see
`closed_book`.

Rows are written as they are measured; arms and seeds that the file already has are not run again.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch

from memdlm.evaluation.recall import CONTEXTS
from memdlm.workflows.studies.plans import MAIN, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import recall_data, run_arm

AIDS = ("token_mixing", "tie_query_key_init")
"""What makes retrieval learnable for a small network within a minute."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(MAIN), help="names, or all")
    parser.add_argument("--without", nargs="+", default=[], choices=AIDS, help="leave out aids of the small family")
    parser.add_argument("--context", choices=CONTEXTS, default="kept")
    parser.add_argument("--steps", type=int, help="default: 200, or 400 with the context dropped")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/recall.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    is_kept = arguments.context == "kept"
    changes = {"network": dict.fromkeys(arguments.without, False)}
    if arguments.steps is not None:
        changes["steps"] = arguments.steps
    plan = RecallPlan(**changes) if is_kept else closed_book(**changes)
    suffix = "".join(f", no {name}" for name in arguments.without) + ("" if is_kept else ", context dropped")
    table = arms(plan)
    names = list(table) if arguments.arms == ["all"] else arguments.arms
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    found |= {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
    data = recall_data(plan)
    for name in names:
        for seed in arguments.seeds:
            label = name + suffix
            if any((row["arm"], row["seed"], row["steps"]) == (label, seed, plan.steps) for row in found["rows"]):
                continue
            row = {"arm": label, **run_arm(plan, data, table[name], seed)}
            found["rows"].append(row)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            print(line(row), flush=True)
    print(markdown(found["rows"]))


def line(row: dict) -> str:
    figures = " ".join(f"{a['length']}{'+' if a['memory'] else '-'}{a['accuracy']:.3f}" for a in row["accuracy"])
    return f"{row['arm']:24} seed {row['seed']}  {figures}  {row['cpu_seconds']:.0f} CPU s"


def markdown(rows: list[dict]) -> str:
    """Return a table: accuracy per length with memory, every seed; the last column without memory at 1x."""
    lengths = sorted({each["length"] for row in rows for each in row["accuracy"]})
    out = ["| arm | " + " | ".join(f"{n} words" for n in lengths) + f" | {lengths[0]} words, memory off | CPU s |"]
    out.append("|---" * (len(lengths) + 3) + "|")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]

        def seen(length: int, is_on: bool, own: list[dict] = own) -> str:
            values = [
                a["accuracy"] for r in own for a in r["accuracy"] if (a["length"], a["memory"]) == (length, is_on)
            ]
            return ", ".join(f"{value:.3f}" for value in values)

        cells = [seen(length, True) for length in lengths] + [seen(lengths[0], False)]
        cells.append(f"{sum(row['cpu_seconds'] for row in own) / len(own):.0f}")
        out.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
