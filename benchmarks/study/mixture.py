"""One model for facts in sight and facts out of sight: which kinds of steps (`mem_batch_mix`) keep which skill.

    python benchmarks/study/mixture.py --mixes 1,1,0 1,1,1 --seeds 0 1 2 [--out benchmarks/study/results/mixture.json]

8 facts in 36 words. A step trains with memory alone (attention reaches 4 tokens), with the text alone, or with both;
every kind gets 300 steps. Measured: recall with memory alone, with the text alone, and with both. Rows are written as
they are measured; those that the file already has are not run again.
"""

import argparse
import dataclasses
import json
import platform
from datetime import date
from pathlib import Path

import torch
from recall_suite import EVEN

from memdlm.evaluation import recall
from memdlm.models.blocks.masks import SlidingWindow
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms
from memdlm.workflows.studies.recall_study import recall_data, train_arm

REACH, STEPS_PER_KIND = 4, 300
SKILLS = {"memory alone": (True, SlidingWindow(REACH)), "text alone": (False, None), "both": (True, None)}
"""Whether the prompt is written, and who sees whom."""


def run(mix: str, seed: int) -> dict:
    kinds = sum(float(share) > 0 for share in mix.split(","))
    steps = STEPS_PER_KIND * kinds
    plan = RecallPlan(window=None, steps=steps, num_train=16 * steps, training=EVEN, learning_rate=2e-3)
    data = recall_data(plan)
    config = dataclasses.replace(arms(plan)[OURS], batch_mix=mix, batch_reach=REACH)
    trained = train_arm(plan, data, config, seed)
    rows = []
    for skill, (is_on, pattern) in SKILLS.items():
        for length, samples in data.by_length.items():
            found = recall(
                trained.model,
                data.tokenizer,
                samples,
                steps=plan.task.num_questions,
                seed=seed,
                memory=trained.memory if is_on else None,
                attention_pattern=pattern,
            )
            rows.append({"skill": skill, "length": length, "accuracy": found.accuracy, "questions": found.questions})
    return {"mix": mix, "seed": seed, "steps": steps, "cpu_seconds": trained.cpu_seconds, "accuracy": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", nargs="+", default=["1,1,0", "1,1,1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/mixture.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    found |= {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
    for mix in arguments.mixes:
        for seed in arguments.seeds:
            if any((row["mix"], row["seed"]) == (mix, seed) for row in found["rows"]):
                continue
            row = run(mix, seed)
            found["rows"].append(row)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            for skill in SKILLS:
                figures = [f"{a['length']}:{a['accuracy']:.3f}" for a in row["accuracy"] if a["skill"] == skill]
                print(f"{mix} seed {seed} {skill:12}", *figures, flush=True)


if __name__ == "__main__":
    main()
