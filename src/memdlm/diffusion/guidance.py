"""Classifier-free guidance: sharpen a prediction by its contrast with one that does not see the prompt."""

from typing import final

from torch import Tensor

from memdlm.types import Denoise, Ids, Logits, Positions, PositionSet


def guided(conditional: Logits, free: Logits, scale: float) -> Logits:
    """Return u + (scale + 1) (c - u) for predictions c with the prompt and u without it, [N, V]."""
    return free + (scale + 1) * (conditional - free)


@final
class ClassifierFree(Denoise):
    """logits = u + (scale + 1) (c - u), where u is predicted with the `is_given` tokens masked."""

    def __init__(
        self,
        denoise: Denoise,
        is_given: PositionSet,
        *,
        mask_token_id: int,
        scale: float,
        free: Denoise | None = None,
    ) -> None:
        self.denoise, self.is_given = denoise, is_given
        # A denoiser with a cache needs a second one for the text without its prompt.
        self.free = denoise if free is None else free
        self.mask_token_id, self.scale = mask_token_id, scale

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return guided logits [N, V]; costs two passes."""
        is_given = self.is_given.repeat_interleave(ids.shape[0] // self.is_given.shape[0], dim=0)
        conditional = self.denoise.logits(ids, positions)
        free = self.free.logits(ids.masked_fill(is_given, self.mask_token_id), positions)
        return guided(conditional, free, self.scale)

    def hidden(self, ids: Ids, positions: Positions) -> Tensor:
        """Return the unguided hidden states: guidance acts on logits only."""
        return self.denoise.hidden(ids, positions)
