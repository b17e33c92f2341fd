"""`transformers.Trainer` for masked diffusion with parametric memory: its flags, its resume, its launchers."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from memdlm.diffusion.losses import normalise
from memdlm.diffusion.schedules import make_schedule
from memdlm.errors import ConfigError
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.adapter_files import reload_outer_adapter
from memdlm.models.outer_adapters import adapter_config
from memdlm.models.prefix import Prefix
from memdlm.randomness import derive
from memdlm.training.arguments import TrainingArguments
from memdlm.training.learned import LearnedTraining
from memdlm.training.noise import TIMES, UNIFORM, EvaluationNoise, add_noise
from memdlm.training.outer import Batch, learnable, memory_of, noise_batch, score

logger = logging.getLogger(__name__)

TOKENS, ROWS, INDEX = "step_tokens", "step_rows", "step_index"
"""Batch entries, scalars: what the whole optimizer step (all ranks) is divided by, and the batch's place in it."""


class MemDLMTrainer(Trainer):
    """Train a masked diffusion language model, with memory if `args.mem_enabled`.

    Logged beside transformers' own figures, all per maskable token: `nll` and `ppl`, the bound without memory, in
    training and evaluation alike; `nll_memory`, the bound with the memory that training writes. With the published
    `mem_write_source=response` the memory has seen the labels it is scored on: compare models by `nll`, never by
    `nll_memory`. While memory is on, training `nll` is measured on the steps that are logged. Evaluation noise is the
    same at every evaluation, and independent of training noise.

    `processing_class` is the tokenizer; `mask_token_id` overrides its mask token. Raises ConfigError when there is
    neither.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        tokenizer = kwargs.get("processing_class")
        found = mask_token_id if mask_token_id is not None else getattr(tokenizer, "mask_token_id", None)
        if found is None:
            raise ConfigError(
                "mask_token_id: the tokenizer has no mask token and none was given. Load it with "
                "memdlm.load_tokenizer, or pass mask_token_id."
            )
        if kwargs.get("compute_metrics") is not None:
            raise ConfigError("compute_metrics: the trainer computes its own (nll, ppl); use a callback for others.")
        super().__init__(model=model, args=args, compute_metrics=_nll_metrics, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError("nn.DataParallel is not supported; launch one process per GPU (accelerate launch).")
        # The loss below is already divided by the totals of the whole optimizer step.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, True
        self._loss_shifts_labels = False
        self.mask_token_id: int = int(found)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_token_id: int = int(found if pad is None else pad)
        self.schedule = make_schedule(args.schedule)
        self.memory = None if args.memory is None else self._new_memory(model)
        self._learned = self._new_learned()
        if args.memory is not None and args.memory.write_source == "response":
            logger.info(
                "mem_write_source=response: memory is written from the labels that the loss then scores, as published; "
                "compare models by nll, never by nll_memory."
            )
        self._spare_padding = args.memory is not None and args.memory.pad_unmask_mode == "both"
        self._open = ExitStack()
        self._sums: dict[str, Tensor] = {}
        self._evaluation_noise = EvaluationNoise("evaluation", args.seed)

    def _new_memory(self, model: nn.Module) -> ParametricMemory:
        return ParametricMemory(
            model,
            self.args.memory,
            mask_token_id=self.mask_token_id,
            schedule=self.schedule,
            right_shift_logits=self.args.right_shift_logits,
        )

    def _new_learned(self) -> LearnedTraining | None:
        """Begin with a start of this run's seed, unless the model came with one."""
        if self.memory is None or self.memory.learned is None:
            return None
        if self.memory.folder is None:
            self.memory.learn_from(self.args.seed)
        callback = LearnedTraining(self.memory.learned, self.accelerator, self.args.max_grad_norm)
        self.add_callback(callback)
        return callback

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; a learned start and learned rates get groups of their own."""
        optimizer = super().create_optimizer(model)
        if self._learned is not None:
            self._learned.add_to(optimizer)
        return optimizer

    # Training -------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Collect the batches of one optimizer step; add its noise and its denominators to each."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        keys = (self.args.seed, "noise", self.state.global_step, self.args.process_index)
        add_noise(batches, keys=keys, stratified=self.args.stratified_times)
        counted = [self._learnable(batch).sum() for batch in batches]
        totals = torch.stack(
            [
                torch.stack(counted).sum().to(device) if counted else torch.zeros((), dtype=torch.int64, device=device),
                torch.tensor(sum(len(batch["input_ids"]) for batch in batches), device=device),
            ]
        )
        tokens, rows = self.accelerator.reduce(totals, reduction="sum").unbind()
        for index, batch in enumerate(batches):
            batch.update({TOKENS: tokens, ROWS: rows, INDEX: index})
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one forward and backward pass; a memory stays open until both are done."""
        # Gradient checkpointing runs layers again during the backward pass, and they must read the same memory.
        with self._open:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the outer loss of one micro-batch, divided by the totals of its optimizer step."""
        if return_outputs:
            raise ConfigError(
                "compute_loss(return_outputs=True): outputs of a noised batch mean nothing; use evaluate."
            )
        batch = self._noised(inputs, inputs[TIMES], inputs[UNIFORM])
        sums, counts = self._outer_sums(model, batch, inputs[INDEX])
        loss = normalise(
            sums,
            counts,
            self.args.loss_norm_type,
            total_tokens=inputs[TOKENS].clamp_min(1),
            total_rows=inputs[ROWS],
        )
        # Data-parallel training averages gradients over ranks; the denominators above are already global.
        return loss.squeeze(0) * self.args.world_size

    def _outer_sums(self, model: nn.Module, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Return the weighted nats and the maskable tokens of every row, both [B], with and without memory as told."""
        mix = 1.0 if self.memory is None else self.memory.config.outer_mix
        sums: Tensor | float = 0.0
        if mix > 0 or self._is_logged_step():
            with torch.set_grad_enabled(mix > 0):
                honest = self._score(model if self.memory is None or mix > 0 else self.memory.model, batch)
            self._count("nll", honest.bound, honest.counts)
            sums = mix * honest.sums if mix > 0 else 0.0
            if mix == 1:
                return honest.sums, honest.counts
        if self.memory is None:
            raise AssertionError("without memory all of the loss is")
        keys = (self.args.seed, "write", self.state.global_step, self.args.process_index, index)
        self._open.enter_context(self._written(batch, derive(*keys)))
        lost = self._score(model, batch, self.memory.prefix)
        self._count("nll_memory", lost.bound, lost.counts)
        return sums + (1 - mix) * lost.sums, lost.counts

    def _is_logged_step(self) -> bool:
        if self.args.logging_strategy == "no":
            return False
        interval = self.state.logging_steps if self.args.logging_strategy == "steps" else 1
        step = self.state.global_step + 1
        return step % max(1, interval) == 0 or (step == 1 and self.args.logging_first_step)

    # Checkpoints ----------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Resume: an outer adapter reads its own file, whose experts transformers does not know."""
        target = self.model if model is None else model
        if adapter_config(target) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            reload_outer_adapter(target, resume_from_checkpoint)
        if self._learned is not None:
            self._learned.learned.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint (`load_best_model_at_end`), as when resuming."""
        if adapter_config(self.model) is None:
            super()._load_best_model()
        else:
            reload_outer_adapter(self.model, self.state.best_model_checkpoint)
        if self._learned is not None:
            self._learned.learned.load(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the model, and beside it what its memory has learned."""
        super()._save(output_dir, state_dict)
        if self._learned is not None and self.args.should_save:
            self._learned.learned.save(self.args.output_dir if output_dir is None else output_dir)

    # Evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the same noise as every time."""
        self._evaluation_noise = EvaluationNoise("evaluation", self.args.seed, self.args.process_index)
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (loss without memory, per-row [bound, bound with memory, count] as [B, 3], counts [B])."""
        inputs = self._prepare_inputs(inputs)
        batch = self._noised(inputs, *self._evaluation_noise.next(inputs["input_ids"]))
        with torch.no_grad(), self.compute_loss_context_manager():
            lost = self._score(model, batch)
            loss = normalise(lost.sums, lost.counts, self.args.loss_norm_type).squeeze(0)
        with_memory = torch.full_like(lost.bound, float("nan"))
        if self.memory is not None:
            randomness = derive("evaluation write", self.args.seed, self._evaluation_noise.row)
            with torch.no_grad(), self._written(batch, randomness, is_alone=True):
                with_memory = self._score(model, batch, self.memory.prefix).bound
        rows = torch.stack([lost.bound, with_memory, lost.counts.to(lost.bound.dtype)], dim=1).float()
        return (loss, None, None) if prediction_loss_only else (loss, rows, lost.counts)

    # Shared ---------------------------------------------------------------------------------------------------

    def _noised(self, inputs: dict[str, Any], times: Tensor, uniform: Tensor) -> Batch:
        return noise_batch(
            inputs,
            times,
            uniform,
            schedule=self.schedule,
            epsilon=self.args.time_epsilon,
            mask_token_id=self.mask_token_id,
            spare_padding=self._spare_padding,
        )

    def _learnable(self, inputs: Mapping[str, Any]) -> Tensor:
        return learnable(
            inputs["labels"],
            inputs.get("attention_mask"),
            inputs.get("is_padding"),
            spare_padding=self._spare_padding,
        )

    def _score(self, model: nn.Module, batch: Batch, prefix: Prefix | None = None) -> Any:
        return score(
            model,
            batch,
            schedule=self.schedule,
            weighting=self.args.loss_weight_type,
            right_shift_logits=self.args.right_shift_logits,
            prefix=prefix,
        )

    def _written(self, batch: Batch, randomness: torch.Generator, *, is_alone: bool = False) -> Any:
        if self.memory is None:
            raise AssertionError("only called while memory is on")
        return memory_of(self.memory, batch, pad_token_id=self.pad_token_id, randomness=randomness, is_alone=is_alone)

    # Logging --------------------------------------------------------------------------------------------------

    def _count(self, name: str, bounds: Tensor, counts: Tensor) -> None:
        new = torch.stack([bounds.detach().double().sum(), counts.double().sum()])
        self._sums[name] = self._sums[name] + new if name in self._sums else new

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the bounds since the last log to transformers' training figures."""
        if "loss" in logs:
            for name in ("nll", "nll_memory"):
                if name in self._sums:
                    total, count = self.accelerator.reduce(self._sums.pop(name), reduction="sum").tolist()
                    logs[name] = total / max(1.0, count)
            if "nll" in logs:
                logs["ppl"] = _exp(logs["nll"])
        super().log(logs, *args, **kwargs)


def _nll_metrics(predicted: EvalPrediction) -> dict[str, float]:
    """Turn per-row sums [N, 3] into bounds per maskable token."""
    rows = torch.from_numpy(predicted.predictions).double()
    tokens = rows[:, 2].sum().clamp_min(1)
    nll = (rows[:, 0].sum() / tokens).item()
    metrics = {"nll": nll, "ppl": _exp(nll)}
    if not rows[:, 1].isnan().any():
        metrics["nll_memory"] = (rows[:, 1].sum() / tokens).item()
    return metrics


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
