"""The parts of a diffusion transformer (DiT): a condition shifts, scales and gates what every block does.

The layout is the one of MDLM, which has it from SEDD: adaLN-Zero (arXiv 2212.09748) around attention with rotary
positions and a feed-forward. In MDLM the condition is the noise level, and the published checkpoints do not look at it:
they are always shown level 0. So the condition is one vector, the same at every position of every text.

B batch, L length, D hidden width, C width of the condition.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from memdlm.models.blocks.key_values import Cached, at
from memdlm.models.blocks.layers import Attention, AttentionShape, Rotary, SelfInitialising, accurate
from memdlm.models.blocks.masks import Segmented

EPS = 1e-5
"""Of the norms, as published; no configuration states it."""


class Conditioning(nn.Linear):
    """A linear layer that reads the condition and never the text.

    So a memory has nothing to write there, and adapters and 4 bits leave it alone unless it is named.
    """

    @torch.no_grad()
    def zero(self) -> None:
        """Begin with a condition that has no effect."""
        self.weight.zero_()
        self.bias.zero_()


class ConstantNoiseLevel(nn.Module):
    """The condition [1, C] of noise level 0, as a function of the weights alone."""

    frequencies = 256
    """Half of them cosines, half of them sines, in this order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Conditioning(self.frequencies, width), nn.SiLU(), Conditioning(width, width))

    def forward(self, like: Tensor) -> Tensor:
        """Return silu(mlp(e)), in the dtype of `like`, for the sinusoids e of 0: every cosine is 1, every sine 0."""
        waves = torch.arange(self.frequencies, device=like.device) < self.frequencies // 2
        return F.silu(self.mlp(waves.to(like.dtype)[None]))


class ModulatedNorm(nn.Module):
    """LayerNorm without a bias, then x (1 + scale) + shift, in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalise the last dimension of [B, L, D]; `shift` and `scale` are [1, D]."""
        dtype = accurate(x.dtype)
        out = F.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), eps=EPS)
        return (out * (1 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)


class ConditionedNorm(ModulatedNorm):
    """The norm before the vocabulary projection, with its own map of the condition."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__(width)
        self.modulation = Conditioning(condition_width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise [B, L, D] under `condition` [1, C]."""
        return super().forward(x, *self.modulation(condition).chunk(2, dim=-1))


class PlainMLP(nn.Module):
    """down(gelu(up(x))), with biases and the tanh approximation of GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class DiTBlock(GradientCheckpointingLayer):
    """Attention, then a feed-forward: each behind a modulated norm, and gated before it is added to what came in."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, AttentionShape.of(config, fused=True), index)
        self.mlp = PlainMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = ModulatedNorm(config.hidden_size)
        self.post_attention_layernorm = ModulatedNorm(config.hidden_size)
        self.modulation = Conditioning(config.cond_dim, 6 * config.hidden_size)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | Segmented | None,
        is_visible: Tensor | None,
        cached: Cached | None,
        queries: Tensor | None,
        condition: Tensor,
    ) -> Tensor:
        """Run on [B, L, D] as `memdlm.models.blocks.layers.Block` does, under `condition` [1, C]."""
        shift, scale, gate, late_shift, late_scale, late_gate = self.modulation(condition).chunk(6, dim=-1)
        inner = self.input_layernorm(x, shift, scale)
        x = at(x, queries) + gate * self.self_attn(inner, rotary, angles, mask, cached, queries)
        return x + late_gate * self.mlp(self.post_attention_layernorm(x, late_shift, late_scale))


class StoredFrequencies(SelfInitialising):
    """The rotary frequencies that published files hold, kept so that they are saved again.

    The network computes its own (`Rotary`), which no dtype rounds; `is_ours` tells whether they are the same.
    """

    inv_freq: Tensor

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        self.width, self.theta = width, theta
        self.register_buffer("inv_freq", self._computed().to(accurate(torch.get_default_dtype())))

    def _computed(self) -> Tensor:
        return 1.0 / self.theta ** (torch.arange(0, self.width, 2, dtype=torch.float32) / self.width)

    def initialise(self, config: Any) -> None:
        """Compute the frequencies, for a file that lacks them."""
        init.copy_(self.inv_freq, self._computed().to(self.inv_freq))

    def is_ours(self) -> bool:
        """Whether what was read is what the network computes, but for rounding."""
        with torch.device(self.inv_freq.device):
            return torch.allclose(self.inv_freq.float(), self._computed(), rtol=1e-2)
