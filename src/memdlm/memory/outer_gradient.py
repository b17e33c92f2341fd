"""Differentiating an outer loss through a write: the exact meta-gradient, one step's activations at a time.

The inner loop runs as it always does and keeps no graph. Each step's gradient g(phi, h, theta) enters the outer graph
as one node that remembers its inputs alone; its backward pass runs the step again, now twice differentiably, and
multiplies what arrives by dg/dphi, dg/dh and dg/dtheta. So K steps cost K sets of fast weights, and one step's
activations at a time.

h, the input of the first adapted block, carries an ordinary graph of the blocks below (`exact`) or none (`exact_top`).
Attention below the first fast weight never lies between a loss and the fast weights, so only the attention above is
differentiated twice and needs an implementation that can be.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from memdlm.errors import ConfigError
from memdlm.memory.fast_weights import FastWeights
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.lower_layers import GivenLowerLayers, LowerLayers, SharedLowerLayers
from memdlm.models.networks.patching import patched, without_checkpointing
from memdlm.types import Denoise, Ids

OUTER_GRADIENTS = ("first_order", "exact", "exact_top")
"""Through what an outer loss is differentiated: fast weights are constants; all of a write; its adapted blocks only."""

TWICE_DIFFERENTIABLE = ("eager", "sdpa")

LossOf = Callable[[Denoise, Tensor | None], Tensor]
"""Returns the inner loss of one step [S] under the fast weights as they are, its positions weighed by gates [N]."""
Step: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor]]
"""What a gradient step starts from: the values and their gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerGradient:
    """A gradient that the inner loop has taken, and what it takes to take it again."""

    found: Sequence[Tensor]
    loss_of: LossOf
    gates: Tensor | None
    """[N]: the weights of the scored positions, with their graph; None: all are 1."""
    ids: Ids
    """The state that the loss was taken at."""
    update: int
    """Numbers the write's gradient steps (dropout)."""


class OuterGradient(ABC):
    """Through what of a write an outer loss is differentiated."""

    @abstractmethod
    def traced(self, values: Sequence[Tensor], gradient: InnerGradient) -> Step:
        """Return `values` and their gradient with as much of a graph as the outer loss follows."""


@final
class Untracked(OuterGradient):
    """Through nothing: what was written is a constant."""

    def traced(self, values: Sequence[Tensor], gradient: InnerGradient) -> Step:
        """Return constants."""
        return [value.detach() for value in values], gradient.found


@final
class FirstOrder(OuterGradient):
    """Through the learned start and rates; the gradients of the steps are constants."""

    def traced(self, values: Sequence[Tensor], gradient: InnerGradient) -> Step:
        """Return the values with their graph, and constants."""
        return values, gradient.found


@final
class Exact(OuterGradient):
    """Through the steps' gradients too, and so through the adapted blocks and what `lower_layers` holds a graph of.

    `denoise` builds what a step reads the network through. Raises ConfigError when the network's attention cannot be
    differentiated twice.
    """

    def __init__(
        self,
        model: nn.Module,
        fast: FastWeights,
        blocks: Sequence[nn.Module],
        denoise: Callable[[LowerLayers | None], Denoise],
        lower_layers: SharedLowerLayers | None,
    ) -> None:
        self.model, self.fast, self.denoise, self.lower_layers = model, fast, denoise, lower_layers
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.blocks = _with_attention_above(model, fast, blocks)
        check_attention(model)

    def traced(self, values: Sequence[Tensor], gradient: InnerGradient) -> Step:
        """Return the values, and the gradient as a function of what it came from."""
        ids, state, autocast = gradient.ids, self.fast.state(), _autocast(values[0].device.type)
        hidden = None if self.lower_layers is None else self.lower_layers.of(ids)
        below = [each for each in (hidden, gradient.gates) if each is not None]

        def again(phi: Sequence[Tensor], lower: Sequence[Tensor]) -> list[Tensor]:
            given = None
            if self.lower_layers is not None and hidden is not None:
                given = GivenLowerLayers(self.lower_layers.first, ids, lower[0])
            gates = None if gradient.gates is None else lower[-1]
            with (
                autocast(),
                # A block that runs again in the second backward pass would find another attention than now.
                without_checkpointing(self.model),
                self.fast.holding(phi, state),
                self.fast.dropping(gradient.update),
                patched({block: partial(_explicitly, block.forward) for block in self.blocks}),
            ):
                return differentiate(gradient.loss_of(self.denoise(given), gates), phi, create_graph=True)

        inputs = (*values, *below, *self.parameters)
        return values, _Again.apply(again, gradient.found, self.parameters, len(values), *inputs)


def differentiate(losses: Tensor, values: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradient of `losses` [S]; samples share nothing, so the sum's gradient is each sample's own."""
    if not losses.requires_grad:
        return [torch.zeros_like(value) for value in values]
    found = torch.autograd.grad(losses.sum(), values, allow_unused=True, create_graph=create_graph)
    return [torch.zeros_like(value) if g is None else g for value, g in zip(values, found, strict=True)]


class _Again(torch.autograd.Function):
    """(phi, h and gates, theta) -> dL/dphi, whose value is known already; `again` computes it with a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        again: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]],
        found: Sequence[Tensor],
        parameters: Sequence[Tensor],
        num_values: int,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.parameters, ctx.num_values = again, parameters, num_values
        # Saved so that autograd notices when one of them is changed in place before the backward pass.
        ctx.save_for_backward(*inputs)
        return tuple(gradient.clone() for gradient in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        leaves = [each.detach().requires_grad_() for each in saved[: len(saved) - len(ctx.parameters)]]
        with torch.enable_grad():
            gradients = ctx.again(leaves[: ctx.num_values], leaves[ctx.num_values :])
            pairs = [(g, v) for g, v in zip(gradients, arriving, strict=True) if g.requires_grad]
            wanted = [*leaves, *ctx.parameters]
            products: Sequence[Tensor | None] = [None] * len(wanted)
            if pairs:
                outputs, vectors = zip(*pairs, strict=True)
                products = torch.autograd.grad(outputs, wanted, vectors, allow_unused=True)
        return (None, None, None, None, *products)


def check_attention(model: nn.Module) -> None:
    """Raise ConfigError unless the model's attention can be differentiated twice."""
    chosen = getattr(getattr(unwrap(model), "config", None), "_attn_implementation", None)
    if chosen is not None and chosen not in TWICE_DIFFERENTIABLE:
        raise ConfigError(
            f"mem_outer_gradient: attention {chosen!r} cannot be differentiated twice; load the model with "
            f"attn_implementation one of {', '.join(TWICE_DIFFERENTIABLE)}, or set mem_outer_gradient=first_order."
        )


def _with_attention_above(model: nn.Module, fast: FastWeights, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the adapted blocks whose attention may read a fast weight."""
    inside = set(blocks[0].modules())
    paths = [site.path for site in fast.sites if site.module in inside]
    # In our families a block's feed-forward comes after its attention; of others nothing is known.
    is_after = isinstance(unwrap(model), MaskedDiffusionLM) and all(".mlp." in path for path in paths)
    return list(blocks[1:] if is_after else blocks)


def _explicitly(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return forward(*args, **kwargs)


def _autocast(device_type: str) -> Callable[[], Any]:
    """Return what restores the mixed precision of this moment in a later backward pass."""
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )
