"""Soft-masking while a canvas is filled: the prediction of a step is a part of the input of the next."""

from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import Tensor, nn

from memdlm.diffusion.soft_masking import SoftMask
from memdlm.models.networks.soft_inputs import blended_inputs
from memdlm.types import Ids, Logits, Positions


@final
class SoftFeedback:
    """The last prediction for every position of a canvas [B, T]; there is none before the first step."""

    def __init__(self, soft: SoftMask, model: nn.Module, shape: torch.Size, device: torch.device) -> None:
        self.soft, self.model = soft, model
        self._begin(shape, device)

    def _begin(self, shape: torch.Size, device: torch.device) -> None:
        self._shape, count = shape, shape.numel()
        self._tokens = torch.zeros(count, self.soft.top_k, dtype=torch.int64, device=device)
        self._weights = torch.zeros(count, self.soft.top_k, device=device)
        self._share = torch.zeros(count, device=device)
        self._has_learned = False

    def _held(self) -> list[Tensor]:
        """Return what is held, by row: [B, T, ...]."""
        return [each.unflatten(0, self._shape) for each in (self._tokens, self._weights, self._share)]

    def admit(self, row: int) -> None:
        """Begin anew in a row, which another text takes."""
        self._held()[2][row] = 0

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to `target`."""
        for each in self._held():
            each[target] = each[source]

    def grow(self, length: int) -> None:
        """Make room for `length` columns."""
        before, width, has_learned = self._held(), self._shape[1], self._has_learned
        self._begin(torch.Size((self._shape[0], length)), self._share.device)
        for new, old in zip(self._held(), before, strict=True):
            new[:, :width] = old
        self._has_learned = has_learned

    def shown(self, ids: Ids, places: Tensor) -> AbstractContextManager[None]:
        """Let the network see, in place of the mask tokens of `ids` [R, W], what was predicted there.

        `places` [R, W] are the canvas positions of `ids`.
        """
        if not self._has_learned:
            return nullcontext()
        flat = places.flatten()
        # All positions, most of them with a share of 0: choosing the others would mean waiting for the device.
        share = self._share[flat] * (ids.flatten() == self.soft.mask_token_id)
        everywhere = torch.arange(flat.numel(), device=flat.device)
        return blended_inputs(self.model, everywhere, self._tokens[flat], self._weights[flat], share)

    def learn(self, logits: Logits, positions: Positions) -> None:
        """Keep what was predicted at `positions` [N] of the canvas."""
        positions, self._has_learned = positions.to(logits.device, non_blocking=True), True
        found = self.soft.feedback(logits, positions)
        self._tokens[positions] = found.tokens
        self._weights[positions] = found.weights.to(self._weights.dtype)
        self._share[positions] = found.share.to(self._share.dtype)
