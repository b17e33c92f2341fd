"""What an inner loss that is estimated from a sample of its positions costs in quality: the recall study's own memory.

    python benchmarks/study/score_fraction.py --seeds 0 1 --fractions 1.0 0.5 0.25

Each model is trained with `mem_inner_score_fraction` and measured twice: written as in training, and from all
positions. Rows are written as they are measured.
"""

import argparse
import dataclasses
import json
import os
import platform
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from memdlm.workflows.studies.plans import OURS, RecallPlan, arms
from memdlm.workflows.studies.recall_study import accuracies, recall_data, train_arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "score_fraction.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = RecallPlan(steps=arguments.steps, times=(1, 4))
    data, rows = recall_data(plan), []
    for fraction in arguments.fractions:
        for seed in arguments.seeds:
            config = dataclasses.replace(arms(plan)[OURS], inner_score_fraction=fraction)
            trained = train_arm(plan, data, config, seed)
            row = {
                "fraction": fraction,
                "seed": seed,
                "steps": plan.steps,
                "cpu_seconds": trained.cpu_seconds,
                "curve": trained.curve,
                "as_trained": accuracies(plan, data, trained, seed),
            }
            if fraction < 1:
                whole = trained.memory.with_options(inner_score_fraction=1.0)
                row["from_all_positions"] = accuracies(plan, data, dataclasses.replace(trained, memory=whole), seed)
            rows.append(row)
            found = {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
            arguments.out.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
            print(line(row), flush=True)


def line(row: dict) -> str:
    figures = [
        f"{name}: " + " ".join(f"{a['length']}{'+' if a['memory'] else '-'}{a['accuracy']:.3f}" for a in row[name])
        for name in ("as_trained", "from_all_positions")
        if name in row
    ]
    return f"{row['fraction']} seed {row['seed']}  {'  '.join(figures)}  {row['cpu_seconds']:.0f} CPU s"


if __name__ == "__main__":
    main()
