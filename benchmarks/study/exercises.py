"""Exercises in reading: before a memory is trained, and beside its training."""

from typing import Any, final

import torch
from pages import Reader
from torch import Tensor, nn

from memdlm.training.trainer import MemDLMTrainer

HIDDEN_WHOLE = 0.999
"""Lowest diffusion time of exercises. With a part of an answer in sight, a network completes it and does not read."""


@final
class Exercises:
    """Reading exercises, made when they are asked for: none is seen twice, and every seed has its own."""

    def __init__(self, reader: Reader, seed: int, count: int, *, start: int = 0) -> None:
        self.reader, self.first, self.count = reader, seed * 10**8 + start, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return one row as the collator takes it."""
        found = self.reader.exercise(self.first + index)
        return {"input_ids": found.input_ids, "labels": found.labels}


@final
class ReadingOn(MemDLMTrainer):
    """Trains a memory, and in every step goes on with a batch of exercises, without memory.

    A network that learns to be written soon reads worse, and then its memory does not know whose a fact is. An exercise
    asks for the owner where a document's question asks for the fact, in the same words: what a write changes is then
    the way from the one to the other.
    """

    def __init__(self, *args: Any, exercises: Exercises, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exercises = exercises

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the gradient of the exercises to that of the step; returns the loss of the memory's training."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        rows = self.args.train_batch_size
        first = self.state.global_step * rows
        inputs = self._prepare_inputs(self.data_collator([self.exercises[first + row] for row in range(rows)]))
        ids = inputs["input_ids"]
        # At time 1 all of an answer is hidden.
        batch = self.objective.noised(
            inputs, torch.ones(rows, device=ids.device), torch.zeros(ids.shape, device=ids.device)
        )
        totals = {"total_tokens": batch.noised.is_masked.sum(), "total_rows": rows}
        with self.compute_loss_context_manager():
            asked = self.objective.score(model, batch, totals=totals).loss
        self.accelerator.backward(asked)
        return loss
