"""Resume from a checkpoint: load its weights and all its states, or raise an error before training starts."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from memdlm.errors import CheckpointError, ConfigError
from memdlm.models.hub.loading import load_weights
from memdlm.training.learned import LearnedTraining
from memdlm.training.states import (
    MEMORY,
    OPTIMIZER,
    RNG,
    SCALER,
    SCHEDULER,
    best_of,
    check_checkpoint,
    read_position,
    read_state,
    readable,
)

FSDP = ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_*")
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Optimizer states that have the shape of their weight."""


class ResumingTrainer(Trainer):
    """`transformers.Trainer` that loads all of a checkpoint, or says what is missing in it."""

    _learned: LearnedTraining | None = None
    _without: frozenset[str] = frozenset()
    _resumed: tuple[Path, ...] = ()
    """The checkpoint that the run was resumed from, if any."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        resume_without: Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Train; with `resume_from_checkpoint`, resume from there (True: from the newest checkpoint in output_dir).

        `resume_without` names states that start anew (see `states.PARTS`). Raises CheckpointError, before training
        starts, when any other part of the checkpoint is missing or damaged.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise CheckpointError(f"resume: {str(self.args.output_dir)!r} has no checkpoint to resume from.")
        self._without = frozenset(resume_without)
        self._resumed = () if checkpoint is None else (Path(checkpoint),)
        if checkpoint is not None:
            if self._without & {OPTIMIZER, SCHEDULER, SCALER} and self._is_sharded():
                raise ConfigError(
                    "resume_without: FSDP and DeepSpeed read their states together; name only rng or memory."
                )
            scaler = getattr(self.accelerator, "scaler", None)
            check_checkpoint(Path(checkpoint), self.args, self._without, needs_scaler=scaler is not None)
        elif self._without:
            raise ConfigError(f"resume_without={','.join(sorted(self._without))} has no effect without a checkpoint.")
        return super().train(checkpoint, *args, **kwargs)

    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights; published names are converted to ours, and no weight may be missing."""
        if not self._is_sharded():
            load_weights(self.model if model is None else model, resume_from_checkpoint)
            return
        # FSDP and DeepSpeed write files of their own, with the network's names, and read them strictly. Without those
        # files transformers would read the weights under published names, and match hardly any of them.
        if self.is_fsdp_enabled and not any(next(Path(resume_from_checkpoint).glob(name), None) for name in FSDP):
            raise CheckpointError(
                f"resume: {resume_from_checkpoint} was not written under FSDP (it has no {FSDP[0]} or {FSDP[1]}). "
                "Resume without FSDP, or name it as the model to start anew from its weights."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint (`load_best_model_at_end`) in the same way as a resumed one."""
        best = self.state.best_model_checkpoint
        if self._is_sharded():
            super()._load_best_model()
        else:
            load_weights(self.model, best)
        if self._learned is not None:
            self._learned.learned.load(best)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Find the run's position; the best checkpoint is looked for where the checkpoints are now."""
        epochs, skipped = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is not None:
            best = read_position(Path(checkpoint))["best_model_checkpoint"]
            place = None if best is None else best_of(Path(checkpoint), best)
            self.state.best_model_checkpoint = None if place is None else str(place)
            # The noise depends on the epoch, which follows from the steps (the data may have been changed on purpose).
            if math.floor(self.state.epoch + 1e-6) != epochs:
                self.state.epoch = self.state.global_step / num_update_steps_per_epoch
            # transformers checks only after a step whether a run is finished.
            if self.state.global_step >= max_steps:
                epochs = num_train_epochs
        return epochs, skipped

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer, schedule and the memory's learned parameters."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self._learned is not None and MEMORY not in self._without:
            self._learned.learned.load(folder)
        if self._is_sharded():
            with readable(folder, OPTIMIZER):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        # With several processes, onto the device: otherwise each process would hold a copy on the CPU.
        on_device = self.args.world_size > 1 and self.args.device.type != "cpu"
        device = self.args.device if on_device else "cpu"
        for part, owner in ((OPTIMIZER, self.optimizer), (SCHEDULER, self.lr_scheduler)):
            if part not in self._without and owner is not None:
                file = folder / f"{part}.pt"
                state = read_state(file, part, device=device if part == OPTIMIZER else "cpu")
                with readable(file, part):
                    owner.load_state_dict(state)
                    if part == OPTIMIZER:
                        _check_moments(owner)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the scale of fp16 gradients."""
        if checkpoint is not None and SCALER not in self._without:
            with readable(Path(checkpoint) / "scaler.pt", SCALER):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the global random state."""
        if checkpoint is not None and RNG not in self._without:
            with readable(Path(checkpoint) / "rng_state.pth", RNG):
                super()._load_rng_state(checkpoint)


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError when a state has not its weight's shape; torch would only notice at the first step."""
    for parameter, state in optimizer.state.items():
        for name in MOMENTS:
            if name in state and state[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, its weight {tuple(parameter.shape)}")
