"""Soft-masking while a canvas is filled: what a step predicted is a part of what the next one sees."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor, nn

from memdlm.diffusion.soft_masking import SoftMask
from memdlm.models.soft_inputs import blended_inputs
from memdlm.types import Ids, Logits, Positions


@final
class SoftFeedback:
    """The last prediction for every position of a canvas [B, T]; none before the first."""

    def __init__(self, soft: SoftMask, model: nn.Module, shape: torch.Size, device: torch.device) -> None:
        self.soft, self.model = soft, model
        count = shape.numel()
        self._tokens = torch.zeros(count, soft.top_k, dtype=torch.int64, device=device)
        self._weights = torch.zeros(count, soft.top_k, device=device)
        self._share = torch.zeros(count, device=device)

    def shown(self, ids: Ids, places: Tensor) -> AbstractContextManager[None]:
        """Let the network see, in place of the mask tokens of `ids` [R, W], what was predicted there.

        `places` [R, W] says which position of the canvas each of them is.
        """
        flat = places.flatten()
        is_soft = (ids.flatten() == self.soft.mask_token_id) & (self._share[flat] > 0)
        where = is_soft.nonzero().squeeze(1)
        if where.numel() == 0:
            return nullcontext()
        known = flat[where]
        return blended_inputs(self.model, where, self._tokens[known], self._weights[known], self._share[known])

    def learn(self, logits: Logits, positions: Positions) -> None:
        """Keep what was predicted at `positions` [N] of the canvas."""
        found = self.soft.feedback(logits, positions)
        self._tokens[positions] = found.tokens
        self._weights[positions] = found.weights.to(self._weights.dtype)
        self._share[positions] = found.share.to(self._share.dtype)
