"""The plan of the demo, full or quick: two panels of models, their sizes, and the device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from memdlm.data.synthetic import KeyValueRecall
from memdlm.errors import ConfigError, MachineError
from memdlm.memory.config import MemoryConfig
from memdlm.models.hub.devices import choose_device, mps_problem
from memdlm.report.model import Task
from memdlm.workflows.studies.plans import MAIN, OURS, RecallPlan, arms, open_book

PUBLISHED = "MemDLM (published)"
LEAK = ("MDLM", PUBLISHED)
"""Models whose training losses the first panel shows."""
READS = {"spells": True, "sentences": True}
"""What users write is read: names and numbers that no model has seen, too."""
ABOUT = {
    "MDLM": "A standard masked diffusion model, trained without memory.",
    PUBLISHED: "Trained with the memory of the MemDLM paper, which is written from the answer in training.",
    "first order": "Trained with a memory of the prompt, but the training does not see how the writing works.",
    OURS: "Trained with a memory of the prompt, and the training adjusts how it is written.",
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model of a panel."""

    memory: MemoryConfig | None
    """The memory it is trained with; None: without memory."""
    folder: str
    """Name of its checkpoints, without the seed."""
    about: str
    """How it is trained, in one sentence."""
    step_cost: float
    """Measured cost of a training step (network, optimizer and Trainer), in training passes."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Models that are compared on one task."""

    plan: RecallPlan
    arms: Mapping[str, Arm]
    seeds: tuple[int, ...]
    description: str
    name: str
    answer_cost: float
    """Cost of a denoising step per conversation of the training length, in training passes; includes other measures."""

    def task(self) -> Task:
        """Return the task as a report describes it."""
        task = self.plan.task
        return Task(
            name=self.name,
            description=self.description,
            chance=task.chance,
            train_length=self.plan.train_length,
            lengths=tuple(self.plan.lengths),
            num_questions=self.plan.num_eval * task.num_questions,
        )

    def checkpoint(self, arm: str, seed: int) -> str:
        """Return the folder name of a model: `mdlm-seed0`, `recall-first-order-seed0`."""
        return f"{self.arms[arm].folder}-seed{seed}"


def recall_panel(plan: RecallPlan, seeds: tuple[int, ...]) -> Panel:
    """Return the panel about recall when attention cannot reach the prompt: four ways to train a memory."""
    task, memories = _key_values(plan), arms(plan)
    names = {"published": PUBLISHED}
    return Panel(
        plan=plan,
        arms={
            names.get(name, name): Arm(
                memory=memories[name],
                folder=f"recall-{name.lower().replace(' ', '-')}",
                about=ABOUT[names.get(name, name)],
                step_cost=cost,
            )
            for name, cost in zip(MAIN, (0.5, 1.3, 1.1, 1.7), strict=True)
        },
        seeds=seeds,
        name="recall from memory alone",
        description=f"{task.num_pairs} errands such as 'Bring Hugo tea.' lie scattered between sentences that do not "
        f"matter. Then {task.num_questions} questions name a person, as in 'Bring Hugo'; the answer is what to bring, "
        f"one of {task.num_values} words. Attention reaches {plan.window} tokens to either side, so when a "
        "question is answered its fact is out of reach: only the fast weights written before can hold it. "
        "Memory on: the prompt is written as the model was trained to write it (standard MDLM and the published "
        "recipe: as published for inference). Memory off: nothing is written.",
        answer_cost=0.01,
    )


def entropy_floor(plan: RecallPlan) -> float:
    """Return the lowest loss per token, in nats, of a model that does not see the facts."""
    # An answer is a value, uniform over all values, and the end of the turn, which is certain.
    return math.log(_key_values(plan).num_values) / 2


def open_book_panel(plan: RecallPlan, seeds: tuple[int, ...]) -> Panel:
    """Return the panel in which attention reaches everything: standard MDLM, and MemDLM as published."""
    task = _key_values(plan)
    # The published memory, with the values that training sets for its unset options.
    memory = MemoryConfig.paper(per_sample=False, sync_inner=True, loss_weight_type="scheduler", loss_norm_type="token")
    return Panel(
        plan=plan,
        arms={
            "MDLM": Arm(memory=None, folder="mdlm", about=ABOUT["MDLM"], step_cost=1.6),
            PUBLISHED: Arm(memory=memory, folder="memdlm", about=ABOUT[PUBLISHED], step_cost=4.0),
        },
        seeds=seeds,
        name="key-value recall",
        description=f"{task.num_pairs} facts such as 'Hugo likes tea.' lie scattered between sentences that do not "
        f"matter; {task.num_questions} questions name a person, as in 'Hugo likes', and the answer is what they "
        f"like, one of {task.num_values} words.",
        answer_cost=0.2,
    )


def _key_values(plan: RecallPlan) -> KeyValueRecall:
    if not isinstance(plan.task, KeyValueRecall):
        raise AssertionError("a panel needs a task of keys and values")
    return plan.task


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Sizes of a demo. The defaults take a few minutes on two CPU cores."""

    seeds: tuple[int, ...] = (0, 1)
    num_recall_seeds: int = 2
    recall: RecallPlan = field(
        default_factory=lambda: RecallPlan(
            task=KeyValueRecall(num_keys=24, is_adjacent=True),
            tokenizer=READS,
            times=(1, 4, 16, 64),
            num_eval=32,
            few_from=64,
        )
    )
    """The first panel, with half of the study's conversations per length, and a length that the study leaves out."""
    open_book: RecallPlan = field(default_factory=lambda: open_book(task=KeyValueRecall(num_keys=24), tokenizer=READS))
    is_quick: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device of all models."""

    @classmethod
    def full(cls, seed: int) -> "DemoPlan":
        """Return the plan of `memdlm demo`: two seeds, `seed` and the next."""
        return cls(seeds=(seed, seed + 1))

    @classmethod
    def quick(cls, seed: int) -> "DemoPlan":
        """Return the plan of `memdlm demo --quick`: fewer facts, half the steps."""
        return cls(
            seeds=(seed, seed + 1),
            num_recall_seeds=1,
            recall=RecallPlan(
                task=KeyValueRecall(num_pairs=4, num_keys=8, num_values=8, num_questions=4, is_adjacent=True),
                tokenizer=READS,
                train_length=18,
                times=(1, 4),
                num_train=1600,
                num_eval=32,
                steps=100,
                batch_size=16,
                rank=8,
            ),
            open_book=open_book(
                task=KeyValueRecall(num_pairs=4, num_keys=12, num_values=12, num_questions=4),
                tokenizer=READS,
                train_length=20,
                num_train=2000,
                num_eval=48,
                steps=300,
                num_evals=3,
            ),
            is_quick=True,
        )

    def panels(self) -> tuple[Panel, Panel]:
        """Return the two panels, in order."""
        return recall_panel(self.recall, self.seeds[: self.num_recall_seeds]), open_book_panel(
            self.open_book, self.seeds
        )


def plan_for(seed: int, *, quick: bool, device: str = "cpu") -> DemoPlan:
    """Return the plan that the command line asks for.

    Raises ConfigError for a negative seed, and for any card but the first (training would use the first anyway).
    Raises MachineError for a device that does not exist.
    """
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, got {seed}.")
    place = choose_device(device)
    if place.type == "mps" and mps_problem(torch.float32) is not None:
        raise MachineError("--device mps: it does not support all that the demo needs. Name cpu, or leave it out.")
    if place.type not in ("cpu", "cuda", "mps") or place.index:
        raise ConfigError(
            f"--device {device}: the demo trains on the CPU or the first CUDA card. Name cpu or cuda, and "
            "choose a card with CUDA_VISIBLE_DEVICES."
        )
    plan = DemoPlan.quick(seed) if quick else DemoPlan.full(seed)

    def there(part: RecallPlan) -> RecallPlan:
        return replace(part, training={**part.training, "use_cpu": place.type == "cpu"})

    return replace(plan, device=place, recall=there(plan.recall), open_book=there(plan.open_book))
