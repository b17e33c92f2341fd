"""What a write minimises at each state: one value per scored position; weights and norms are applied by the loop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm.diffusion.losses import cross_entropy
from memdlm.memory.trajectory import TrajectoryStep
from memdlm.types import Denoise, Logits, Positions


class Objective(ABC):
    """An inner objective. Teachers are the same model with the current fast weights, without gradient."""

    @abstractmethod
    def __call__(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Return [N] values at `positions` of `step`."""


@final
@dataclass(frozen=True, slots=True)
class CrossEntropy(Objective):
    """Cross-entropy to the true tokens, in nats (ce)."""

    def __call__(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Predict the true tokens."""
        return cross_entropy(denoise.logits(step.ids, positions), step.clean.flatten()[positions])


def _log_probabilities(
    denoise: Denoise, step: TrajectoryStep, positions: Positions, tau: float
) -> tuple[Logits, Logits]:
    with torch.no_grad():
        teacher = F.log_softmax(_wide(denoise.logits(step.next_ids, positions)) / tau, dim=-1)
    return teacher, F.log_softmax(_wide(denoise.logits(step.ids, positions)) / tau, dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@final
@dataclass(frozen=True, slots=True)
class ForwardKL(Objective):
    """KL(teacher || student) at a temperature, without its square as a factor (distill)."""

    distill_temperature: float = 1.0

    def __call__(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Follow the teacher's distribution one reveal later."""
        teacher, student = _log_probabilities(denoise, step, positions, self.distill_temperature)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@final
@dataclass(frozen=True, slots=True)
class ReverseKL(Objective):
    """KL(student || teacher) at a temperature, without its square as a factor (distill_reverse)."""

    distill_temperature: float = 1.0

    def __call__(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Stay where the teacher has mass."""
        teacher, student = _log_probabilities(denoise, step, positions, self.distill_temperature)
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


@final
@dataclass(frozen=True, slots=True)
class HiddenDistillation(Objective):
    """Distance of the last hidden states, both after the final norm (distill_hidden)."""

    distill_hidden_type: str = "mse"

    def __call__(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Return the mean squared difference over channels, or 1 - cosine similarity."""
        with torch.no_grad():
            teacher = _wide(denoise.hidden(step.next_ids, positions))
        student = _wide(denoise.hidden(step.ids, positions))
        if self.distill_hidden_type == "cosine":
            return 1 - F.cosine_similarity(student, teacher, dim=-1)
        return (student - teacher).square().mean(-1)


OBJECTIVES: dict[str, type[Objective]] = {
    "ce": CrossEntropy,
    "distill": ForwardKL,
    "distill_reverse": ReverseKL,
    "distill_hidden": HiddenDistillation,
}
HIDDEN_TYPES = ("mse", "cosine")
