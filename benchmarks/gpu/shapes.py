"""Networks with the true shapes of the published ones, and random weights that are made on the device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from card import Card
from torch import nn

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.models import LLaDA2MoeConfig, LLaDAMoEConfig, build_model

MASK = 1
"""The mask token of `words_of`."""
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
}
TRUE: dict[str, Callable[..., Any]] = {
    # LLaDA-MoE-7B-A1B and LLaDA2.x-mini: the configurations' own defaults, but for what is set here.
    "lladamoe": lambda **more: LLaDAMoEConfig(max_position_embeddings=16384, **more),
    "llada2": lambda **more: LLaDA2MoeConfig(num_key_value_heads=4, **more),
}
SMALL: dict[str, Callable[..., Any]] = {
    "lladamoe": lambda **more: LLaDAMoEConfig(**{**TINY, "expert_intermediate_size": 16, **more}),
    "llada2": lambda **more: LLaDA2MoeConfig(
        **{**TINY, "intermediate_size": 48, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2, **more}
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """A network of a published shape, as deep as the device's memory allows."""

    model: nn.Module
    layers: int
    of_layers: int
    """The published depth."""

    def about(self) -> dict[str, Any]:
        """Return what a row says about the network."""
        return {"layers": self.layers, "of_layers": self.of_layers, "parameters": _count(self.model)}


def network(
    card: Card, family: str, *, bytes_per_parameter: float = 2.0, dtype: torch.dtype = torch.bfloat16
) -> Network:
    """Build a network with as many of its layers as fit into 0.8 of what is free, in eval mode.

    `bytes_per_parameter`: of the weights and of all that grows with them, such as gradients and optimizer states.
    """
    make = (SMALL if card.is_quick else TRUE)[family]
    of_layers = make().num_hidden_layers
    layers = layers_that_fit(make, of_layers, 0.8 * card.free_bytes() / bytes_per_parameter)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # float32 first would need twice the room
    try:
        with card.device:
            model = build_model(make(num_hidden_layers=layers), seed=0)
    finally:
        torch.set_default_dtype(before)
    for buffer in model.buffers():
        buffer.data = buffer.data.float()  # a router's bias, which checkpoints keep in float32
    return Network(model.eval(), layers, of_layers)


def layers_that_fit(make: Callable[..., Any], of_layers: int, parameters: float) -> int:
    """Return how many layers a network of at most `parameters` has: `of_layers` at most, two at least."""
    with torch.device("meta"):
        two, three = (_count(build_model(make(num_hidden_layers=n), seed=0)) for n in (2, 3))
    return int(max(2, min(of_layers, 2 + (parameters - two) // (three - two))))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def words_of(model: nn.Module) -> Any:
    """Return a tokenizer of one word per token; its mask token is `MASK`."""
    return build_word_tokenizer(f"w{index:06}" for index in range(model.config.vocab_size - 5))


def ids_of(model: nn.Module, rows: int, length: int) -> torch.Tensor:
    """Return random words [rows, length] on the model's device."""
    g = torch.Generator().manual_seed(length)
    return torch.randint(5, model.config.vocab_size, (rows, length), generator=g).to(model.device)


@dataclasses.dataclass(slots=True)
class Shelf:
    """Holds one network at a time; jobs of one family in a row share it."""

    card: Card
    options: dict[str, Any]
    held: tuple[str, Network] | None = None

    def of(self, family: str) -> Network:
        if self.held is None or self.held[0] != family:
            self.held = None
            self.card.clean()
            self.held = family, network(self.card, family, **self.options)
        return self.held[1]
