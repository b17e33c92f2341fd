"""The border between a transformers model and the diffusion mathematics."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, final

from torch import Tensor, nn

from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.foreign import ForeignModel, chooses_positions
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.lower_layers import LowerLayers, SharedLowerLayers, State
from memdlm.models.networks.requests import Request
from memdlm.models.networks.shifting import shift_of, shifted
from memdlm.types import Denoise, Features, Ids, Logits, PerToken, Positions


@final
class ModelDenoiser(Denoise):
    """A model with a fixed attention mask, as the `Denoise` that losses, writes and samplers take.

    `model` may be wrapped (DDP, PEFT), and may be of another family (`memdlm.models.border.foreign`).
    `attention_mask` [B, L] (or 4-D) belongs to B texts: when ids of m*B rows come in, row i uses the mask of text
    i // m. With `right_shift_logits` (None: as the family was trained; Dream was so) the token at column i is predicted
    by the network's output at column i - 1. Column 0 keeps its own, and so does the first column that a 2-D
    `attention_mask` shows.

    `lower_layers` supplies the hidden states below its first block. `is_constant` promises that only what is attached
    to the model from outside needs gradients, and only once: the vocabulary projection then costs less memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attention_mask: Tensor | None = None,
        attention_pattern: AttentionPattern | None = None,
        right_shift_logits: bool | None = None,
        lower_layers: LowerLayers | None = None,
        is_constant: bool = False,
    ) -> None:
        self.model, self.attention_mask = model, attention_mask
        self.attention_pattern, self.right_shift_logits = attention_pattern, shift_of(model, right_shift_logits)
        network = unwrap(model)
        self.is_ours = isinstance(network, MaskedDiffusionLM)
        self.foreign = None if chooses_positions(network) else ForeignModel(model, network)
        self.lower_layers = lower_layers if self.is_ours or self.foreign is not None else None
        self.is_constant = is_constant

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions`."""
        if self.foreign is not None:
            with self._continued(self.foreign, ids):
                return self.foreign.logits(
                    ids, self._shifted(ids, positions), self._mask_for(ids), self.attention_pattern
                )
        return self._call(ids, positions).logits

    def hidden(self, ids: Ids, positions: Positions) -> Features:
        """Return [N, D] normalised last hidden states that predict the tokens at `positions`."""
        if self.foreign is not None:
            with self._continued(self.foreign, ids):
                return self.foreign.hidden(
                    ids, self._shifted(ids, positions), self._mask_for(ids), self.attention_pattern
                )
        return self._call(ids, positions, Request(hidden_only=True)).hidden

    def below(self, ids: Ids, positions: Positions) -> Features:
        """Return [N, D], the input of the first block above `lower_layers`, at `positions`, with its graph."""
        hidden = self._below(ids)
        if isinstance(self.lower_layers, SharedLowerLayers):
            hidden = self.lower_layers.of(ids)
        assert hidden is not None, "below needs lower_layers"
        return hidden.flatten(0, 1)[self._shifted(ids, positions)]

    def features(self, ids: Ids, positions: Positions) -> Tensor:
        """Return the hidden states, or the logits if the network is not ours."""
        return self.hidden(ids, positions) if self.is_ours else self.logits(ids, positions)

    def read(self, ids: Ids, positions: Positions, per_token: PerToken) -> Tensor:
        """Return [N] values; our families hold at most a chunk of logits for it."""
        if not self.is_ours:
            return super().read(ids, positions, per_token)
        return self._call(ids, positions, Request(per_token=per_token, is_constant=self.is_constant)).per_token

    def read_sum(self, ids: Ids, positions: Positions, per_token: PerToken, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the values; in our families no chunk of logits is computed twice."""
        if not self.is_ours or self.is_constant:
            return super().read_sum(ids, positions, per_token, weights)
        out = self._call(ids, positions, Request(per_token=per_token, weights=weights))
        return out.total, out.per_token

    def _call(self, ids: Ids, positions: Positions, request: Request | None = None) -> Any:
        arguments: dict[str, Any] = {"attention_mask": self._mask_for(ids), "positions": self._shifted(ids, positions)}
        if self.attention_pattern is not None:
            arguments["attention_pattern"] = self.attention_pattern
        hidden = self._below(ids)
        if self.lower_layers is not None and hidden is not None:
            request = replace(Request() if request is None else request, start_layer=self.lower_layers.first)
            return self.model(inputs_embeds=hidden, request=request, **arguments)
        # A foreign network may take `positions`, but it knows no requests.
        return self.model(input_ids=ids, **arguments, **({} if request is None else {"request": request}))

    @contextmanager
    def _continued(self, foreign: ForeignModel, ids: Ids) -> Iterator[None]:
        hidden, lower = self._below(ids), self.lower_layers
        with nullcontext() if lower is None or hidden is None else foreign.resumed(lower.first, hidden):
            yield

    def _below(self, ids: Ids) -> Tensor | None:
        """Return the hidden states at the boundary of the lower layers, if a call on `ids` may begin there."""
        if self.lower_layers is None:
            return None
        first, mask, pattern = self.lower_layers.first, self._mask_for(ids), self.attention_pattern

        def lower() -> Tensor:
            if self.foreign is not None:
                return self.foreign.below(ids, mask, pattern, stop=first)
            request = Request(stop_layer=first)
            return self.model(input_ids=ids, attention_mask=mask, attention_pattern=pattern, request=request).hidden

        return self.lower_layers.hidden(State(ids, self.attention_mask, pattern), lower)

    def _shifted(self, ids: Ids, positions: Positions) -> Positions:
        positions = positions.to(ids.device, non_blocking=True)
        if not self.right_shift_logits:
            return positions
        mask = self._mask_for(ids)
        is_visible = None if mask is None or mask.dim() != 2 else mask
        return shifted(positions, ids.shape[1], is_visible)

    def _mask_for(self, ids: Ids) -> Tensor | None:
        mask = self.attention_mask
        if mask is not None and mask.shape[0] not in (1, ids.shape[0]):
            mask = mask.repeat_interleave(ids.shape[0] // mask.shape[0], dim=0)
        if mask is not None and mask.dim() == 2 and mask.shape[0] != ids.shape[0]:
            mask = mask.expand(ids.shape[0], -1)
        return mask
