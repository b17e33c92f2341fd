"""Sizes of a network: the positions it was trained on, and the parameters that one token uses."""

from torch import nn

from memdlm.models.blocks.experts import Experts
from memdlm.models.lora.wrappers import unwrap


def trained_positions(model: nn.Module) -> int | None:
    """Return how many positions `model` was trained on, as its configuration says, or None if it does not."""
    places: int | None = getattr(getattr(unwrap(model), "config", None), "max_position_embeddings", None)
    return places


def active_parameters(model: nn.Module) -> int:
    """Return how many parameters take part in one token's prediction; of routed experts only the chosen share."""
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", 0) or 0
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, Experts):
            size = sum(parameter.numel() for parameter in module.parameters())
            total -= size * (module.num_experts - chosen) // module.num_experts
    return total
