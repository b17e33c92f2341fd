"""The first panel of the demo: what a memory holds when attention cannot reach the prompt any more.

Four models differ in how their memory is trained; a sliding window keeps the facts out of the questions' reach.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from memdlm.data.collate import Collator
from memdlm.data.synthetic import KeyValueRecall
from memdlm.memory.config import MemoryConfig
from memdlm.types import Ids
from memdlm.workflows.display import Display
from memdlm.workflows.recall_study import (
    CURVES,
    MAIN,
    OURS,
    RecallData,
    RecallPlan,
    Trained,
    accuracies,
    arms,
    new_model,
    train_arm,
    written_losses,
)

LEAK = ("MDLM", "published")
"""Whose training losses are drawn."""
STEP_COST = {"MDLM": 0.5, "published": 1.3, "first order": 1.1, OURS: 1.7}
"""Training passes that a step of each arm costs (network, optimizer and Trainer), measured."""
EVALUATION_COST = 0.08
"""Training passes that answering one conversation of the training length costs, over all denoising steps."""


def empty_panel(plan: RecallPlan, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return the panel before anything was measured."""
    task = plan.task
    if not isinstance(task, KeyValueRecall):
        raise AssertionError("the panel tells of keys and values")
    return {
        "task": {
            "name": "recall from memory alone",
            "description": f"{task.num_pairs} facts of the form 'fact k3 v17' lie scattered in filler words. Then "
            f"{task.num_questions} questions name a key; the answer is its value, one of {task.num_values}. Attention "
            f"reaches {plan.window} tokens to either side, so when a question is answered its fact is gone: only what "
            "was written into fast weights before can tell it. Memory on: the prompt is written as the model was "
            "trained to write it (standard MDLM and the published recipe: as published for inference). Memory "
            "off: nothing is written.",
            "chance": task.chance,
            "train_length": plan.train_length,
            "lengths": [plan.train_length * times for times in plan.times],
            "num_questions": plan.num_eval * task.num_questions,
        },
        # An answer is a value, uniform over all, and the end of the turn, which is certain.
        "floor": math.log(task.num_values) / 2,
        "leak": list(LEAK),
        "seeds": list(seeds),
        "models": [],
        "accuracy": [],
        "exposure_bias": [],
    }


def fill_panel(panel: dict[str, Any], plan: RecallPlan, data: RecallData, out: Path, display: Display) -> None:
    """Train and measure every model on every seed; a model's rows reach `panel` when all of them are there."""
    for seed in panel["seeds"]:
        for arm in MAIN:
            _one_model(panel, plan, data, arm, seed, out, display)


def _one_model(
    panel: dict[str, Any], plan: RecallPlan, data: RecallData, arm: str, seed: int, out: Path, display: Display
) -> None:
    name, config = f"{arm}, seed {seed}", arms(plan)[arm]
    with display.bar("train", f"{name}: training", plan.steps) as advance:
        trained = train_arm(plan, data, config, seed, advance)
    folder = out / "checkpoints" / panel_checkpoint(arm, seed)
    trained.model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    if trained.memory.learned is not None:
        trained.memory.learned.save(folder)
    with display.bar("evaluate", f"{name}: answering", 2 * len(plan.times) * plan.num_eval) as advance:
        accuracy = accuracies(plan, data, trained, seed, advance)
    panel["models"].append(_row(plan, data, trained, config, arm, seed))
    panel["accuracy"] += [{"model": arm, "seed": seed, **row} for row in accuracy]


def _row(
    plan: RecallPlan, data: RecallData, trained: Trained, config: MemoryConfig | None, arm: str, seed: int
) -> dict[str, Any]:
    options = {"learning_rate": plan.learning_rate, "batch_size": plan.batch_size, "training_rows": len(data.train)}
    memory = {} if config is None else {"memory": asdict(config)}
    row = {
        "model": arm,
        "seed": seed,
        "parameters": trained.model.num_parameters(),
        "steps": plan.steps,
        "seconds": trained.seconds,
        "config": {"network": trained.model.config.to_diff_dict(), "training": options, **memory},
        "curve": {name: trained.curve.get(name, []) for name in CURVES},
        "rates": trained.rates,
    }
    if arm == OURS:
        row["written"] = written_losses(plan, data, trained)
    return row


def panel_checkpoint(arm: str, seed: int) -> str:
    """Return the folder name of a model of the panel: `recall-first-order-seed0`."""
    return f"recall-{arm.lower().replace(' ', '-')}-seed{seed}"


def panel_seconds(plan: RecallPlan, data: RecallData, num_seeds: int, device: torch.device) -> float:
    """Time one training pass, and count how many of them the whole panel costs."""
    batch = Collator(data.tokenizer.pad_token_id)(data.train[: plan.batch_size])
    spent = pass_seconds(new_model(plan, data, seed=0), batch["input_ids"], device)
    training = plan.steps * sum(STEP_COST[arm] for arm in MAIN)
    evaluation = len(MAIN) * plan.num_eval * sum(plan.times) * EVALUATION_COST
    return spent * num_seeds * (training + evaluation)


def pass_seconds(model: PreTrainedModel, input_ids: Ids, device: torch.device) -> float:
    """Return the seconds of one forward and backward pass over `input_ids` [B, L] on `device`, the median of a few."""
    model.to(device)
    input_ids, spent = input_ids.to(device), []
    for _ in range(8):
        start = time.perf_counter()
        model(input_ids).logits.float().logsumexp(-1).mean().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        spent.append(time.perf_counter() - start)
    return sorted(spent)[len(spent) // 2]
