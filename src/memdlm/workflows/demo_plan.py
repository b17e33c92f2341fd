"""Sizes of the demo, whole and quick, and where it runs."""

from dataclasses import dataclass, field, replace

import torch

from memdlm.data.synthetic import KeyValueRecall
from memdlm.errors import ConfigError, MachineError
from memdlm.models.devices import choose_device, mps_problem
from memdlm.workflows.recall_study import RecallPlan

QUICK_RECALL = RecallPlan(
    task=KeyValueRecall(num_pairs=4, num_keys=8, num_values=8, num_questions=4, is_adjacent=True),
    train_length=18,
    times=(1, 4),
    num_train=1600,
    num_eval=32,
    steps=100,
    batch_size=16,
    rank=8,
)


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """Sizes of a demo. The defaults take a few minutes on two CPU cores."""

    seeds: tuple[int, ...] = (0, 1)
    task: KeyValueRecall = field(default_factory=lambda: KeyValueRecall(num_pairs=8, num_keys=24))
    train_length: int = 40
    """Words of context in training; evaluated at one, two and four times that."""
    num_train: int = 4000
    num_eval: int = 64
    """Conversations per length, and in each evaluation of the loss."""
    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 2e-3
    num_evals: int = 8
    answer_steps: int = 8
    """Denoising steps in which all answers of a conversation are decoded."""
    recall: RecallPlan = field(default_factory=lambda: RecallPlan(num_eval=32))
    """The first panel, with half the conversations of the study per figure."""
    num_recall_seeds: int = 2
    is_quick: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of all models."""

    @classmethod
    def full(cls, seed: int) -> "DemoPlan":
        """Return the plan of `memdlm demo`: two seeds, `seed` and the next."""
        return cls(seeds=(seed, seed + 1))

    @classmethod
    def quick(cls, seed: int) -> "DemoPlan":
        """Return the plan of `memdlm demo --quick`: fewer facts, half the steps."""
        return cls(
            seeds=(seed, seed + 1),
            task=KeyValueRecall(num_pairs=4, num_keys=12, num_values=12, num_questions=4),
            train_length=20,
            num_train=2000,
            num_eval=48,
            steps=300,
            num_evals=3,
            answer_steps=4,
            recall=QUICK_RECALL,
            num_recall_seeds=1,
            is_quick=True,
        )

    @property
    def lengths(self) -> list[int]:
        """Evaluated context lengths, in words."""
        return [self.train_length * times for times in (1, 2, 4)]


def plan_for(seed: int, *, quick: bool, device: str = "cpu") -> DemoPlan:
    """Return the plan that the command line asks for.

    Raises ConfigError for a negative seed, and for another card than the first, which training would take all the same;
    MachineError for a device that is not there.
    """
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, got {seed}.")
    place = choose_device(device)
    if place.type == "mps" and mps_problem(torch.float32) is not None:
        raise MachineError("--device mps: not all that the demo needs runs on it. Name cpu, or leave it out.")
    if place.type not in ("cpu", "cuda", "mps") or place.index:
        raise ConfigError(
            f"--device {device}: the demo's training takes the CPU or the first CUDA card. Name cpu or cuda, and "
            "choose a card with CUDA_VISIBLE_DEVICES."
        )
    plan = DemoPlan.quick(seed) if quick else DemoPlan.full(seed)
    training = {**plan.recall.training, "use_cpu": place.type == "cpu"}
    return replace(plan, device=place, recall=replace(plan.recall, training=training))
