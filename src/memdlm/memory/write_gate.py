"""How much of each token a write writes, learned: what filler writes drowns the facts of a long text."""

from typing import Any, final

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.models.lora.wrappers import unwrap
from memdlm.types import Features, Values

STRETCH = 1.2
"""How far the gate reaches beyond its ends before it is cut there, so that it can be closed for good."""
WIDTH = 48
"""The width of a state at which `mem_write_gate_lr` was chosen. One step of Adam moves w . h in proportion to the
width: at 4096 it would shut or open every gate for good, if w . h were not divided by the width."""


@final
class WriteGate(nn.Module):
    """The weight of a token in the inner loss: g = 1 + 1.2 tanh(a / 2), cut to [0, 2], a = (48 / D) w . h / rms(h) + b.

    h is the input of the first adapted block at the token's masked position. It has seen the neighbours and not the
    token, nor does it depend on the fast weights, so that a gate is a constant of the inner gradient. All gates are 1
    at the beginning. A sigmoid alone is never closed, and thousands of filler words add up; a stretched and cut one
    (Louizos et al. 2018, without their noise) is.
    """

    def __init__(self, width: int, like: Tensor | None = None) -> None:
        super().__init__()
        where: dict[str, Any] = {}
        if like is not None:
            where = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.weight = nn.Parameter(torch.zeros(width, **where))
        self.bias = nn.Parameter(torch.zeros(1, **where))

    def forward(self, hidden: Features) -> Values:
        """Return [N] weights, in float32 at least, for the states `hidden` [N, D]."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        a = wide @ self.weight.to(wide) * (WIDTH / wide.shape[-1]) + self.bias.to(wide)
        return (1 + STRETCH * torch.tanh(a / 2)).clamp(0, 2)


def width_below(model: nn.Module, first_block: int) -> int:
    """Return the width D of the states that a gate reads; raises ConfigError where there is nothing to read."""
    if first_block == 0:
        raise ConfigError(
            "mem_write_gate='learned' reads the state below the first adapted block, and the first block of this model "
            "is adapted: that state is the mask token's embedding and nothing else. Lower mem_inner_layer_fraction, or "
            "set mem_write_gate=none."
        )
    config = getattr(unwrap(model), "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(
            f"mem_write_gate='learned' needs the width of a model's states; {type(unwrap(model)).__name__} has no "
            "config.hidden_size. Set mem_write_gate=none."
        )
    return width
