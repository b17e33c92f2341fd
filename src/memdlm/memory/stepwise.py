"""A write that is done gradient by gradient: in between the model is bare, and other memories may be read."""

from collections.abc import Callable, Generator
from typing import TypeAlias, final

import torch
from torch import nn

from memdlm.errors import ConfigError
from memdlm.memory.chunks import Text
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.files.exporting import WrittenText, check_written
from memdlm.memory.files.saved import SavedMemory
from memdlm.memory.inner_loop import Written
from memdlm.models.networks.lower_layers import SharedLowerLayers
from memdlm.models.networks.soundness import blaming

Steps: TypeAlias = Generator[None, None, tuple[Written, SharedLowerLayers | None]]


@final
class Writing:
    """A write under way, from `ParametricMemory.writing`."""

    def __init__(
        self,
        model: nn.Module,
        fast: FastWeights,
        text: Text,
        steps: Steps,
        *,
        total: int,
        export: Callable[[WrittenText, int | None], SavedMemory],
    ) -> None:
        self.total = total
        """Gradients that the write takes: every update takes one for each chunk."""
        self.done = 0
        """Gradients so far."""
        self._model, self._fast, self._text, self._steps, self._export = model, fast, text, steps, export
        self._source: WrittenText | None = None

    def step(self) -> bool:
        """Take one gradient; returns whether the write is done.

        Raises NotFiniteError when the memory or the loss under it is not finite at the end, and what a call of the
        model raises. Then the write is over, and `close` lets go of it.
        """
        with self._fast.attached(), torch.inference_mode(False), torch.enable_grad():
            try:
                next(self._steps)
            except StopIteration as end:
                written, _ = end.value
            else:
                self.done += 1
                return False
        self.done = self.total
        with blaming(self._model):
            check_written(written.losses[-1], self._fast.tensors())
        self._source = WrittenText(self._text.clean, self._text.is_maskable, written)
        return True

    def export(self, row: int | None = None) -> SavedMemory:
        """Return what was written, as `ParametricMemory.export`; ConfigError before the write is done."""
        if self._source is None:
            raise ConfigError("the write is not done; call step until it is.")
        return self._export(self._source, row)

    def close(self) -> None:
        """Forget what was written, or what was to be."""
        self._steps.close()
        self._fast.erase()
