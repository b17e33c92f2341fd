"""The border between a transformers model and the diffusion mathematics."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn

from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.foreign import ForeignModel, chooses_positions
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.prefix import Prefix, SharedPrefix, State
from memdlm.types import Denoise, Ids, Logits, Positions, Readout


@final
class ModelDenoiser(Denoise):
    """A model with a fixed attention mask, as the `Denoise` that losses, writes and samplers take.

    `model` may be wrapped (DDP, PEFT), and may be of another family (`memdlm.models.border.foreign`).
    `attention_mask` [B, L] (or 4-D) belongs to B texts: when ids of m*B rows come in, row i uses the mask of text
    i // m. With `right_shift_logits` (networks converted from autoregressive ones) the token at column i is predicted
    by the network's output at column i - 1; column 0 keeps its own.

    A `prefix` supplies what lies below its first block. `is_constant` promises that only what is attached to the model
    from outside is differentiated, once: the vocabulary projection then costs less memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attention_mask: Tensor | None = None,
        attention_pattern: AttentionPattern | None = None,
        right_shift_logits: bool = False,
        prefix: Prefix | None = None,
        is_constant: bool = False,
    ) -> None:
        self.model, self.attention_mask = model, attention_mask
        self.attention_pattern, self.right_shift_logits = attention_pattern, right_shift_logits
        network = unwrap(model)
        self.is_ours = isinstance(network, MaskedDiffusionLM)
        self.foreign = None if chooses_positions(network) else ForeignModel(model, network)
        self.prefix = prefix if self.is_ours or self.foreign is not None else None
        self.is_constant = is_constant

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions`."""
        if self.foreign is not None:
            with self._continued(self.foreign, ids):
                return self.foreign.logits(
                    ids, self._shifted(ids, positions), self._mask_for(ids), self.attention_pattern
                )
        return self._call(ids, positions).logits

    def hidden(self, ids: Ids, positions: Positions) -> Tensor:
        """Return [N, D] normalised last hidden states that predict the tokens at `positions`."""
        if self.foreign is not None:
            with self._continued(self.foreign, ids):
                return self.foreign.hidden(
                    ids, self._shifted(ids, positions), self._mask_for(ids), self.attention_pattern
                )
        return self._call(ids, positions, project=False).hidden_states[-1]

    def below(self, ids: Ids, positions: Positions) -> Tensor:
        """Return [N, D], the input of the first block above the prefix at `positions`, with the graph that it has."""
        hidden = self._below(ids)
        if isinstance(self.prefix, SharedPrefix):
            hidden = self.prefix.kept(ids)
        assert hidden is not None, "there is a boundary"
        return hidden.flatten(0, 1)[self._shifted(ids, positions)]

    def features(self, ids: Ids, positions: Positions) -> Tensor:
        """Return the hidden states; of a network that is not ours, the logits."""
        return self.hidden(ids, positions) if self.is_ours else self.logits(ids, positions)

    def read(self, ids: Ids, positions: Positions, readout: Readout) -> Tensor:
        """Return [N] values; our families never hold more than a chunk of logits for it."""
        if not self.is_ours:
            return super().read(ids, positions, readout)
        values: Tensor = self._call(ids, positions, readout=readout, constant_projection=self.is_constant).loss
        return values

    def read_sum(self, ids: Ids, positions: Positions, readout: Readout, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the values; of our families without computing a chunk of logits twice."""
        if not self.is_ours or self.is_constant:
            return super().read_sum(ids, positions, readout, weights)
        out = self._call(ids, positions, readout=readout, readout_weights=weights)
        return out.loss, out.logits

    def _call(self, ids: Ids, positions: Positions, **arguments: Any) -> Any:
        arguments |= {"attention_mask": self._mask_for(ids), "positions": self._shifted(ids, positions)}
        if self.attention_pattern is not None:
            arguments["attention_pattern"] = self.attention_pattern
        hidden = self._below(ids)
        if self.prefix is None or hidden is None:
            return self.model(input_ids=ids, **arguments)
        return self.model(inputs_embeds=hidden, start_layer=self.prefix.first, **arguments)

    @contextmanager
    def _continued(self, foreign: ForeignModel, ids: Ids) -> Iterator[None]:
        hidden = self._below(ids)
        with nullcontext() if self.prefix is None or hidden is None else foreign.resumed(self.prefix.first, hidden):
            yield

    def _below(self, ids: Ids) -> Tensor | None:
        """Return the hidden states at the prefix's boundary, if a call on `ids` may begin there."""
        if self.prefix is None:
            return None
        first, mask, pattern = self.prefix.first, self._mask_for(ids), self.attention_pattern

        def lower() -> Tensor:
            if self.foreign is not None:
                return self.foreign.below(ids, mask, pattern, stop=first)
            out = self.model(input_ids=ids, attention_mask=mask, attention_pattern=pattern, stop_layer=first)
            hidden: Tensor = out.hidden_states[-1]
            return hidden

        return self.prefix.hidden(State(ids, self.attention_mask, pattern), lower)

    def _shifted(self, ids: Ids, positions: Positions) -> Positions:
        positions = positions.to(ids.device, non_blocking=True)
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
