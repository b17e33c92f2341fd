"""Exercises in reading: before a memory is trained, and beside its training."""

from typing import Any, final

import torch
from pages import Reader
from torch import Tensor, nn

from memdlm.training.trainer import MemDLMTrainer
from memdlm.types import IGNORE_INDEX

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
        self.last_asked: Tensor | None = None
        """Loss of the last step's exercises, [], in nats per token."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the gradient of the exercises to that of the step; returns the loss of the memory's training."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        rows = self.args.train_batch_size
        first = self.state.global_step * rows
        batch = self.data_collator([self.exercises[first + row] for row in range(rows)])
        batch = {name: value.to(self.args.device) for name, value in batch.items() if isinstance(value, Tensor)}
        is_hidden = batch["labels"] != IGNORE_INDEX
        ids = batch["input_ids"].masked_fill(is_hidden, self.mask_token_id)
        with self.compute_loss_context_manager():
            logits = model(input_ids=ids, attention_mask=batch.get("attention_mask")).logits
            asked = torch.nn.functional.cross_entropy(logits[is_hidden].float(), batch["labels"][is_hidden])
        self.accelerator.backward(asked)
        self.last_asked = asked.detach()
        return loss
