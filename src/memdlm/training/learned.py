"""Train the memory's own parameters (start, rates and gate) beside the model.

They are no part of the model. A launcher sums over ranks, clips and zeroes only the model's gradients, so the same is
done here for theirs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from memdlm.memory.learned import LearnedWrite


class LearnedTraining(TrainerCallback):
    """Keeps the gradients of `learned` in step with the model's; `accelerator` knows the ranks."""

    def __init__(self, learned: LearnedWrite, accelerator: Any, max_norm: float) -> None:
        self.learned, self.accelerator, self.max_norm = learned, accelerator, max_norm
        self.grad_norm: Tensor | None = None
        """Gradient norm of the last step, before clipping."""

    def add_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Let `optimizer` update the learned parameters, unless it does already."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for group in self.learned.groups():
            if not known & {id(parameter) for parameter in group["params"]}:
                optimizer.add_param_group(group)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Average the gradients over ranks, as data-parallel training does, and clip them by their own norm."""
        for parameter in self.learned.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        most = self.max_norm if self.max_norm > 0 else math.inf
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.learned.parameters(), most)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Zero the gradients."""
        self.learned.zero_grad()
