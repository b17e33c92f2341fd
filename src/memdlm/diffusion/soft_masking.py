"""Soft-masking ("Soft-Masked Diffusion Language Models", Hersche et al., arXiv 2510.17206): feedback for masks.

A position that stays masked is shown to the next pass as a mix of the mask token's embedding and those of the tokens
that the last pass found likely, instead of as [MASK] alone. With p the last prediction and H its entropy in nats:

    input = (1 - lambda) e(mask) + lambda sum over the k likeliest tokens of p_i / (their sum) e(i)
    lambda = scale * sigmoid(steepness * (-H(p) - centre))

As in the self-conditioning of Chen et al. (Analog Bits, arXiv 2208.04202), a part of the training rows goes through a
first pass without gradient whose prediction is then fed back, so that the network learns to read it. The paper learns
scale, steepness and centre; here they are options, with the values of its authors' example configuration as defaults.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from memdlm.diffusion.choice import ids_on
from memdlm.options import option
from memdlm.types import Denoise, Ids, Logits, Positions, Project


class Feedback(NamedTuple):
    """What the network sees at N masked positions."""

    positions: Positions
    tokens: Tensor
    """[N, k] int64, the likeliest tokens."""
    weights: Tensor
    """[N, k], their probabilities, 1 in all."""
    share: Tensor
    """[N] lambda: how much of the input they are; the rest is the mask token's."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SoftMask:
    """How a prediction becomes feedback; also a `PerToken` function, which keeps only the feedback of the logits."""

    mask_token_id: int
    top_k: int
    scale: float
    steepness: float
    centre: float

    def __call__(self, features: Tensor, chosen: slice, project: Project) -> Tensor:
        """Return [n, 2k + 1]: tokens, weights and share, in one tensor of floats."""
        found = self.feedback(project(features), torch.arange(chosen.start, chosen.stop))
        return torch.cat((found.tokens.to(found.weights.dtype), found.weights, found.share[:, None]), dim=1)

    def feedback(self, logits: Logits, positions: Positions) -> Feedback:
        """Return the feedback of predictions `logits` [N, V] at `positions` [N]; the mask token is never a part of it.

        Computed in float32 or wider, so that `__call__` returns token ids exactly.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        wide = wide.index_fill(-1, ids_on((self.mask_token_id,), wide.device), float("-inf"))
        logs = wide.log_softmax(-1)
        entropy = torch.special.entr(logs.exp()).sum(-1)
        likeliest = logs.topk(self.top_k, dim=-1)
        share = self.scale * torch.sigmoid(self.steepness * (-entropy - self.centre))
        return Feedback(positions, likeliest.indices, likeliest.values.softmax(-1), share)

    @torch.no_grad()
    def ask(self, denoise: Denoise, ids: Ids, positions: Positions) -> Feedback:
        """Return the feedback of a first pass over `ids`, without gradient."""
        found = denoise.read(ids, positions, self)
        tokens, weights, share = found.split((self.top_k, self.top_k, 1), dim=1)
        return Feedback(positions, tokens.long(), weights, share.squeeze(1))


@dataclass(frozen=True, kw_only=True)
class SoftMaskOptions:
    """The options of soft-masking that training and decoding share."""

    soft_mask_top_k: int = option(
        3, "Soft-masking: number of likeliest tokens that are mixed in.", minimum=1, maximum=2**16
    )
    soft_mask_scale: float = option(
        0.25, "Soft-masking: largest share of the prediction in the mixture.", minimum=0, maximum=1
    )
    soft_mask_steepness: float = option(
        5.0, "Soft-masking: how fast the share of the prediction grows with its certainty.", minimum=0, maximum=1e6
    )
    soft_mask_centre: float = option(
        -1.0,
        "Soft-masking: minus the entropy (nats) at which the share is half of soft_mask_scale.",
        minimum=-1e6,
        maximum=0,
    )

    def soft_masking(self, mask_token_id: int) -> SoftMask:
        """Return the `SoftMask` that these options describe."""
        return SoftMask(
            mask_token_id=mask_token_id,
            top_k=self.soft_mask_top_k,
            scale=self.soft_mask_scale,
            steepness=self.soft_mask_steepness,
            centre=self.soft_mask_centre,
        )
