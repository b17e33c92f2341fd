"""Where fast weights sit: which projections of which blocks, found by name on any wrapped model."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn

from memdlm.errors import ConfigError, did_you_mean
from memdlm.models.blocks.dit import Conditioning
from memdlm.models.blocks.experts import Experts
from memdlm.models.blocks.looped import passes_of
from memdlm.models.blocks.structure import blocks_of
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One projection that gets fast weights: a linear layer, or one projection of all experts of a layer."""

    path: str
    """Dotted name in the unwrapped model, e.g. model.layers.15.mlp.experts.up_proj."""
    module: nn.Module
    projection: str | None
    """For stacked experts, which of their projections; None for a linear layer."""
    in_features: int
    out_features: int
    num_experts: int | None
    device: torch.device

    def shape(self, num_samples: int) -> tuple[int, ...]:
        """Return the leading sizes of this site's tensors: [S], or [E, S] for experts."""
        return (num_samples,) if self.num_experts is None else (self.num_experts, num_samples)


def first_adapted_layer(num_layers: int, fraction: float) -> int:
    """Return floor(n * (1 - f)) in exact arithmetic; raises ConfigError when no layer is left to adapt."""
    start = math.floor(num_layers * (1 - Fraction(str(fraction))))
    if start >= num_layers:
        raise ConfigError(
            f"mem_inner_layer_fraction {fraction} of {num_layers} layers adapts none; "
            f"use at least {1 / num_layers:.3g} to adapt one."
        )
    return start


def adapted_blocks(model: nn.Module, fraction: float) -> tuple[int, list[nn.Module]]:
    """Return the index of the first adapted block of `model`, and the blocks from there on."""
    blocks = blocks_of(unwrap(model))
    start = first_adapted_layer(len(blocks), fraction)
    return start, blocks[start:]


FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
"""The projections of the feed-forward, as our families name them: the default targets."""


def find_sites(model: nn.Module, targets: tuple[str, ...], fraction: float) -> tuple[Site, ...]:
    """Return the sites named by `targets` in the last `fraction` of the blocks of `model`, in model order.

    A target is our name of a projection, the same in every family, or the name in the family's published code
    (ff_proj, attn_out, dense, ...), or the end of a dotted name (output.dense). The default targets mean those of them
    that there are: a feed-forward without a gate has two (MDLM). A network that has none of them by name gets fast
    weights in its feed-forward, found by structure (see `feed_forward`). Raises ConfigError when a target names nothing
    in those blocks; the message lists what they have.
    """
    network = unwrap(model)
    published = type(network).published_module_name if isinstance(network, MaskedDiffusionLM) else str
    _, layers = adapted_blocks(model, fraction)
    names = {module: name for name, module in network.named_modules()}
    names |= {module: name for name, module in (passes_of(network) or {}).items()}
    candidates = [site for layer in layers for site in _candidates(layer, names[layer])]
    available = {site.path.rpartition(".")[2]: None for site in candidates}
    ends = {site.path: _ends(site.path) | _ends(published(site.path)) for site in candidates}
    known = set().union(*ends.values())
    if set(targets) == set(FEED_FORWARD):
        targets = tuple(target for target in targets if target in known) or targets
        found = [site for layer in layers for site in feed_forward(layer, names[layer], network)]
        if found and known.isdisjoint(targets):
            return tuple(found)
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"mem_inner_target_modules names {target!r}, which is no projection of the {len(layers)} "
                f"adapted blocks. They have: {', '.join(available)}.{did_you_mean(target, available)}"
            )
    return tuple(site for site in candidates if not ends[site.path].isdisjoint(targets))


def feed_forward(layer: nn.Module, prefix: str, network: nn.Module) -> list[Site]:
    """Return the linear layers of a block that lead from its width to a larger one or back, outside its attention.

    BERT's intermediate.dense and output.dense, for example, ALBERT's ffn and ffn_output, ModernBERT's mlp.Wi and Wo.
    """
    width = getattr(getattr(network, "config", None), "hidden_size", None)
    found = []
    for site in _candidates(layer, prefix):
        narrow, wide = sorted((site.in_features, site.out_features))
        inside = site.path.removeprefix(prefix).lower()
        if narrow < wide and narrow == (width or narrow) and "attn" not in inside and "attention" not in inside:
            found.append(site)
    return found


def follows_structure(sites: tuple[Site, ...], targets: tuple[str, ...]) -> bool:
    """Whether `sites` were found by structure, since the network has none of the default `targets` by name."""
    leaves = {site.path.rpartition(".")[2] for site in sites}
    return set(targets) == set(FEED_FORWARD) and leaves.isdisjoint(FEED_FORWARD)


def _ends(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _candidates(layer: nn.Module, prefix: str) -> list[Site]:
    found = []
    for name, module in layer.named_modules(prefix=prefix):
        if isinstance(module, Experts):
            for projection in module.projections:
                wide, narrow = module.sizes(projection)
                found.append(
                    Site(
                        path=f"{name}.{projection}",
                        module=module,
                        projection=projection,
                        in_features=wide,
                        out_features=narrow,
                        num_experts=module.num_experts,
                        device=next(module.parameters()).device,
                    )
                )
        elif isinstance(module, nn.Linear) and not isinstance(module, Conditioning) and ".lora_" not in name:
            # Inside an outer LoRA the wrapped layer is called base_layer; the projection is its parent.
            found.append(
                Site(
                    path=name.removesuffix(".base_layer"),
                    module=module,
                    projection=None,
                    in_features=module.in_features,
                    out_features=module.out_features,
                    num_experts=None,
                    device=module.weight.device,
                )
            )
    return found
