"""The border between a transformers model and the diffusion mathematics."""

from typing import Any, final

import torch
from torch import Tensor, nn

from memdlm.models.foreign import ForeignModel, chooses_positions
from memdlm.models.masks import AttentionPattern
from memdlm.models.wrappers import unwrap
from memdlm.types import Denoise, Ids, Logits, Positions


@final
class ModelDenoiser(Denoise):
    """A model with a fixed attention mask, as the `Denoise` that losses, writes and samplers take.

    `model` may be wrapped (DDP, PEFT), and may be of another family (`memdlm.models.foreign`).
    `attention_mask` [B, L] (or 4-D) belongs to B texts: when ids of m*B rows come in, row i uses the mask of text
    i // m. With `right_shift_logits` (networks converted from autoregressive ones) the token at column i is predicted
    by the network's output at column i - 1; column 0 keeps its own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attention_mask: Tensor | None = None,
        attention_pattern: AttentionPattern | None = None,
        right_shift_logits: bool = False,
    ) -> None:
        self.model, self.attention_mask = model, attention_mask
        self.attention_pattern, self.right_shift_logits = attention_pattern, right_shift_logits
        network = unwrap(model)
        self.foreign = None if chooses_positions(network) else ForeignModel(model, network)

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions`."""
        positions, mask = self._shifted(ids, positions), self._mask_for(ids)
        if self.foreign is not None:
            return self.foreign.logits(ids, positions, mask, self.attention_pattern)
        return self._call(ids, positions, mask).logits

    def hidden(self, ids: Ids, positions: Positions) -> Tensor:
        """Return [N, D] normalised last hidden states that predict the tokens at `positions`."""
        positions, mask = self._shifted(ids, positions), self._mask_for(ids)
        if self.foreign is not None:
            return self.foreign.hidden(ids, positions, mask, self.attention_pattern)
        return self._call(ids, positions, mask, project=False).hidden_states[-1]

    def _shifted(self, ids: Ids, positions: Positions) -> Positions:
        if not self.right_shift_logits:
            return positions
        return torch.where(positions % ids.shape[1] == 0, positions, positions - 1)

    def _mask_for(self, ids: Ids) -> Tensor | None:
        mask = self.attention_mask
        if mask is not None and mask.shape[0] not in (1, ids.shape[0]):
            mask = mask.repeat_interleave(ids.shape[0] // mask.shape[0], dim=0)
        if mask is not None and mask.dim() == 2 and mask.shape[0] != ids.shape[0]:
            mask = mask.expand(ids.shape[0], -1)
        return mask

    def _call(self, ids: Ids, positions: Positions, mask: Tensor | None, **arguments: Any) -> Any:
        if self.attention_pattern is not None:
            arguments["attention_pattern"] = self.attention_pattern
        return self.model(input_ids=ids, attention_mask=mask, positions=positions, **arguments)
