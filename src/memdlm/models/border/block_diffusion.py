"""Block diffusion: every noised block of a text predicted behind the clean blocks before it, all in one pass."""

from typing import final

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.models.blocks.masks import BlockDiffusion
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.shifting import shift_of
from memdlm.types import Denoise, Features, Ids, Logits, PerToken, Positions


def prepare_block_diffusion(model: nn.Module, block_size: int) -> None:
    """Make `model` ready to be trained in blocks of `block_size` tokens.

    A configuration that states its block size (SDAR, A2D) states this one from now on, so that the saved model is
    decoded as it was trained. Raises ConfigError unless the network can see a noised and a clean text in one pass
    without mixing them.
    """
    network = unwrap(model)
    if not isinstance(network, MaskedDiffusionLM):
        raise ConfigError(
            "block_size (block diffusion) needs a network of memdlm's own families, which take the noised and the "
            f"clean text in one pass; {type(network).__name__} does not. Leave block_size out."
        )
    network.model.check_pattern(BlockDiffusion(block_size))
    if "block_size" in network.config.to_dict():
        network.config.block_size = block_size


@final
class BlockDiffusionDenoiser(Denoise):
    """A model that sees a noised text [B, L] block by block: block b behind the `clean` blocks 0 .. b - 1.

    One pass over [x_t | x_0], 2 L columns, gives for every block what a block-causal pass over the clean text before
    it and the noised block alone would give (BD3-LM, arXiv 2503.09573). `attention_mask` [B, L] hides padding in both
    parts. No token before column `start` may be asked for; the noised text before the block of that column is then
    left out of the pass, because nothing else sees it. With `right_shift_logits` (None: as the family was trained)
    column i of the noised text is predicted by the output at its column i - 1, also where a block begins, as published
    (dLLM).
    """

    def __init__(
        self,
        model: nn.Module,
        clean: Ids,
        block_size: int,
        *,
        start: int = 0,
        attention_mask: Tensor | None = None,
        right_shift_logits: bool | None = None,
    ) -> None:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ConfigError(
                f"block diffusion takes a 2-D attention_mask [B, L], got {attention_mask.dim()} dimensions."
            )
        self.clean = clean
        # At least one block is left, and the column that a shifted prediction is read from.
        first = (
            min(start, clean.shape[1]) - 1 if shift_of(model, right_shift_logits) else min(start, clean.shape[1] - 1)
        )
        self.start = max(0, first) // block_size * block_size
        self._network = ModelDenoiser(
            model,
            attention_mask=None if attention_mask is None else self._pair(attention_mask, attention_mask),
            attention_pattern=BlockDiffusion(block_size, self.start),
            right_shift_logits=right_shift_logits,
        )

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions` of the noised text."""
        return self._network.logits(*self._joined(ids, positions))

    def hidden(self, ids: Ids, positions: Positions) -> Features:
        """Return [N, D] normalised last hidden states that predict these tokens."""
        return self._network.hidden(*self._joined(ids, positions))

    def features(self, ids: Ids, positions: Positions) -> Tensor:
        """Return the hidden states."""
        return self._network.features(*self._joined(ids, positions))

    def read(self, ids: Ids, positions: Positions, per_token: PerToken) -> Tensor:
        """Return [N] values."""
        return self._network.read(*self._joined(ids, positions), per_token)

    def read_sum(self, ids: Ids, positions: Positions, per_token: PerToken, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the values."""
        return self._network.read_sum(*self._joined(ids, positions), per_token, weights)

    def _joined(self, ids: Ids, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return [x_t | x_0], and where the positions of x_t are in it."""
        clean, width = self.clean, ids.shape[1]
        if len(ids) != len(clean):
            clean = clean.repeat_interleave(len(ids) // len(clean), dim=0)
        joined = self._pair(ids, clean)
        return joined, positions // width * joined.shape[1] + positions % width - self.start

    def _pair(self, noised: Tensor, clean: Tensor) -> Tensor:
        return torch.cat((noised[:, self.start :], clean), dim=1)
