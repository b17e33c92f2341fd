"""Stop a diverging run: say where it diverged, and save nothing of it."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.errors import DivergedError, NotFiniteError
from memdlm.training.checkpoints import checkpoints_in
from memdlm.training.finite import NEVER, FiniteWatch, largest
from memdlm.training.saving import SavingTrainer

LOSS, GRADIENT, WEIGHTS, LEARNED, STATES = (
    *("the loss", "the gradient's norm", "the weights"),
    *("the memory's learned start or rates", "the optimizer's state"),
)
SKIPPED = 40
"""Optimizer steps in a row that fp16 may skip: its scale starts at 2^16 and is halved at each."""
UNBOUNDED = "ppl"
"""Part of the names of metrics that may be infinite: exp of a finite loss can be."""


class GuardedTrainer(SavingTrainer):
    """A trainer that raises DivergedError for the first loss, gradient, weight or evaluation that is not finite.

    The device notes at once what is not finite in a step. The host reads it at the next step (on a GPU, one step
    later), before anything is logged, evaluated or saved, and at the end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = FiniteWatch((LOSS, GRADIENT), self.args.device)
        self._last_taken: int | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; discard what an earlier call noted."""
        self._watch, self._last_taken = FiniteWatch((LOSS, GRADIENT), self.args.device), None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one forward and backward pass."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._watch.note(LOSS, loss, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._note_gradient(norm, self.state.global_step + 1)
        return norm

    def _note_gradient(self, norm: Any, step: int) -> None:
        # fp16 scales the loss up until a gradient overflows, and skips that step.
        is_scaled = self.args.fp16 or getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not is_scaled:
            self._watch.note(GRADIENT, torch.as_tensor(norm), step)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, *args: Any, **kw: Any
    ) -> None:
        """Check for divergence before anything is logged, evaluated or saved."""
        if self._learned is not None:
            self._note_gradient(self._learned.grad_norm, self.state.global_step)
        self._count_skipped()
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._stop_if_unsound()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kw)

    def _count_skipped(self) -> None:
        """Stop a run whose gradients are infinite at any scale; accelerate knows it without a device query."""
        step = self.state.global_step
        if self._last_taken is None or not self.accelerator.optimizer_step_was_skipped:
            self._last_taken = step
        elif step - self._last_taken >= SKIPPED:
            raise self._diverged(GRADIENT, self._last_taken + 1)

    def _stop_soon_if(self, flag: Tensor) -> None:
        """Stop when `flag`, summed over ranks, is set; all ranks call it once per optimizer step."""
        if self._watch.has_arrived(flag):
            self._stop_if_unsound()

    def _stop_if_unsound(self, *, with_states: bool = False) -> None:
        """Raise DivergedError if anything was or is not finite. All ranks take part, and wait for the device."""
        step = self.state.global_step
        held = {WEIGHTS: [each for each in self.model.parameters() if each.requires_grad]}
        if self._learned is not None:
            held[LEARNED] = list(self._learned.learned.parameters())
        if with_states and self.optimizer is not None and not self.is_deepspeed_enabled:
            states = self.optimizer.state.values()
            held[STATES] = [each for state in states for each in state.values() if isinstance(each, Tensor)]
        kinds, first = (*self._watch.kinds, *held), [*self._watch.first().unbind()]
        for tensors in held.values():
            first.append(torch.where(largest(tensors).isfinite(), NEVER, step).to(first[0].device))
        everywhere = self.accelerator.gather(torch.stack(first)).view(-1, len(kinds)).amin(0).tolist()
        place = min(range(len(kinds)), key=lambda index: everywhere[index])
        if everywhere[place] < NEVER:
            raise self._diverged(kinds[place], everywhere[place])

    def _diverged(self, what: str, step: int) -> NotFiniteError:
        """Return the error for something that was not finite in or after optimizer step `step`."""
        if not self.is_in_train:
            return NotFiniteError(f"{what} held NaN or infinity: load a model whose weights are finite.")
        kept = checkpoints_in(Path(str(self.args.output_dir))) or self._resumed
        args = self.args
        clipping = f"max_grad_norm (now {args.max_grad_norm:g}{'' if args.max_grad_norm else ': no clipping'})"
        return DivergedError(
            f"training diverged: {what} at step {step} held NaN or infinity. Nothing of it was saved; "
            + (f"the last sound checkpoint is {kept[-1]}. " if kept else "no checkpoint had been saved before. ")
            + f"Train with a lower learning_rate (now {args.learning_rate:g}) or a smaller, positive {clipping}."
        )

    # Evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; metrics that are not finite are an error, and are never logged."""
        out = super().evaluation_loop(*args, **kwargs)
        for name, value in out.metrics.items():
            if UNBOUNDED not in name and not math.isfinite(value):
                raise self._diverged(f"the evaluation's {name}", self.state.global_step)
        return out

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Never take NaN for the best metric (a callback may have put it there)."""
        name = self.args.metric_for_best_model
        value = None if name is None else metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if value is not None and math.isnan(value):
            raise self._diverged(f"the evaluation's {name}", self.state.global_step)
        return bool(super()._determine_best_metric(metrics, trial))

    # Saving and the end ---------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_if_unsound(with_states=True)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model if everything in it is finite."""
        if not _internal_call:
            self._stop_if_unsound()
        super().save_model(output_dir, _internal_call)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._stop_if_unsound()
        return super()._finalize_training(*args, **kwargs)
