"""The recall study at 12 and 80 million parameters and 1 to 8 thousand tokens; needs a GPU for about 20 minutes.

    python benchmarks/study/long.py --out benchmarks/study/results/long.json
    python benchmarks/study/long.py --smoke        # everything once, tiny, on a CPU: no result

For every size: recall with attention that does not reach the facts, by standard MDLM, the published recipe, first order
and the memory that learns to be written, at 1, 2, 4 and 8 times the training length, memory on and off; and open book,
with attention over everything. Rows hold the curve (loss with and without memory), seconds and peak device memory.
**It has not been run**: the settings are those of the small study, scaled by rules of thumb, and nothing here is a
measured result.
"""

import argparse
import dataclasses
import json
import platform
from datetime import date
from pathlib import Path

import torch

from memdlm.data.synthetic import KeyValueRecall
from memdlm.workflows.studies.plans import MAIN, RecallPlan, arms
from memdlm.workflows.studies.recall_study import recall_data, run_arm

GPU = {"use_cpu": False, "bf16": True}
SIZES = {
    "12M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "80M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 11, "num_attention_heads": 12},
}


def plan_of(size: str) -> RecallPlan:
    """64 facts in 1024 words, 16 questions; rank 64, one for each fact."""
    steps = {"12M": 1200, "80M": 600}[size]
    return RecallPlan(
        task=KeyValueRecall(
            wording="symbols", num_pairs=64, num_keys=128, num_values=64, num_questions=16, is_adjacent=True
        ),
        train_length=1024,
        times=(1, 2, 4, 8),
        num_train=16 * 200,
        num_eval=32,
        steps=steps,
        batch_size=16,
        learning_rate={"12M": 2e-3, "80M": 1e-3}[size],
        rank=64,
        window=64,
        network={**SIZES[size], "max_position_embeddings": 16384, "initializer_range": 0.05},
        training=GPU,
    )


def smoke() -> RecallPlan:
    """Everything that `plan_of` uses, as small as it gets, on a CPU."""
    return RecallPlan(
        task=KeyValueRecall(
            wording="symbols", num_pairs=3, num_keys=6, num_values=6, num_questions=2, is_adjacent=True
        ),
        train_length=16,
        times=(1, 2),
        num_train=8,
        num_eval=2,
        steps=2,
        batch_size=4,
        rank=4,
        network={"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        training={"bf16": True},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/long.json"))
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no GPU was found; --smoke runs everything tiny on a CPU.")
    plans = {"smoke": smoke()} if arguments.smoke else {size: plan_of(size) for size in arguments.sizes}
    found: dict = {"rows": []}
    if arguments.out.exists() and not arguments.smoke:
        found = json.loads(arguments.out.read_text())
    device = "cpu" if arguments.smoke else torch.cuda.get_device_name()
    found |= {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {device}",
        "torch": torch.__version__,
    }
    for size, plan in plans.items():
        for reach, own in (("window", plan), ("open book", dataclasses.replace(plan, window=None))):
            data = recall_data(own)
            for arm in MAIN:
                for seed in arguments.seeds:
                    key = {"size": size, "reach": reach, "arm": arm, "seed": seed}
                    if any(key.items() <= row.items() for row in found["rows"]):
                        continue
                    row = measured(own, data, arm, seed)
                    found["rows"].append(key | row)
                    print(size, reach, arm, seed, *(f"{a['length']}:{a['accuracy']:.3f}" for a in row["accuracy"]))
                    if not arguments.smoke:
                        arguments.out.parent.mkdir(parents=True, exist_ok=True)
                        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(plan: RecallPlan, data: object, arm: str, seed: int) -> dict:
    """Run one model; `peak_bytes` is None without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row = run_arm(plan, data, arms(plan)[arm], seed)
    return row | {"peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}


if __name__ == "__main__":
    main()
