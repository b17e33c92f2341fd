"""What a write minimises at each state: one value per scored position; weights and norms are applied by the loop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm.diffusion.losses import Nats
from memdlm.memory.trajectory import TrajectoryStep
from memdlm.types import Denoise, Logits, Positions, Project, Values


class Objective(ABC):
    """An inner objective: what to follow, and how far from it a prediction is."""

    @abstractmethod
    def target(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Return what to follow at `positions`, [N] or [N, D], a constant.

        Teachers are the same model with the current fast weights, without gradient.
        """

    @abstractmethod
    def values(self, denoise: Denoise, step: TrajectoryStep, positions: Positions, target: Tensor) -> Values:
        """Return [N], how far the prediction at each of `positions` of `step` is from `target`."""


@final
@dataclass(frozen=True, slots=True)
class CrossEntropy(Objective):
    """Cross-entropy to the true tokens, in nats (ce)."""

    def target(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Return the true tokens."""
        return step.clean.flatten()[positions]

    def values(self, denoise: Denoise, step: TrajectoryStep, positions: Positions, target: Tensor) -> Values:
        """Return the cross-entropy."""
        return denoise.read(step.ids, positions, Nats(target))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass(frozen=True, slots=True)
class _Distillation(Objective):
    """A divergence between the student's distribution and the teacher's one reveal later, at a temperature."""

    distill_temperature: float = 1.0

    def target(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Return the teacher's features."""
        with torch.no_grad():
            return denoise.features(step.next_ids, positions)

    def values(self, denoise: Denoise, step: TrajectoryStep, positions: Positions, target: Tensor) -> Values:
        """Return the divergence, without the temperature's square as a factor."""

        def per_token(features: Tensor, chosen: slice, project: Project) -> Tensor:
            with torch.no_grad():
                teacher = self._log_probabilities(target[chosen], project)
            return self.divergence(teacher, self._log_probabilities(features, project))

        return denoise.read(step.ids, positions, per_token)

    @abstractmethod
    def divergence(self, teacher: Logits, student: Logits) -> Values:
        """Return [N] from the logarithms of two distributions [N, V]."""

    def _log_probabilities(self, features: Tensor, project: Project) -> Logits:
        return F.log_softmax(_wide(project(features)) / self.distill_temperature, dim=-1)


@final
@dataclass(frozen=True, slots=True)
class ForwardKL(_Distillation):
    """KL(teacher || student) (distill)."""

    def divergence(self, teacher: Logits, student: Logits) -> Values:
        """Follow the teacher's distribution."""
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@final
@dataclass(frozen=True, slots=True)
class ReverseKL(_Distillation):
    """KL(student || teacher) (distill_reverse)."""

    def divergence(self, teacher: Logits, student: Logits) -> Values:
        """Stay where the teacher has mass."""
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


@final
@dataclass(frozen=True, slots=True)
class HiddenDistillation(Objective):
    """Distance of the last hidden states, both after the final norm (distill_hidden)."""

    distill_hidden_type: str = "mse"

    def target(self, denoise: Denoise, step: TrajectoryStep, positions: Positions) -> Tensor:
        """Return the teacher's hidden states one reveal later."""
        with torch.no_grad():
            return denoise.hidden(step.next_ids, positions)

    def values(self, denoise: Denoise, step: TrajectoryStep, positions: Positions, target: Tensor) -> Values:
        """Return the mean squared difference over channels, or 1 - cosine similarity."""
        student, teacher = _wide(denoise.hidden(step.ids, positions)), _wide(target)
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
