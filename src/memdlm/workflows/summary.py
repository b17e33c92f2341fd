"""Describe a model and where its fast weights would sit, from its configuration alone; no weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.memory.adapters import Adapter
from memdlm.memory.config import FastWeightsConfig
from memdlm.memory.sites import Site, find_sites
from memdlm.models.hub.families import block_size_of, family_of
from memdlm.models.hub.loading import model_skeleton
from memdlm.models.networks.shifting import shift_of
from memdlm.models.networks.sizes import active_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteGroup:
    """All sites with the same name and size."""

    projection: str
    in_features: int
    out_features: int
    num_experts: int | None
    """Experts per site; None for a linear layer."""
    layers: tuple[int, ...]
    """The block of every site; a block with several sites is listed several times."""
    num_parameters: int
    """Number of parameters of one memory, over all blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSummary:
    """Sizes of a model and of one memory for it."""

    family: str
    model_class: str
    dtype: str
    block_size: int | None
    """Tokens of the blocks in which it is decoded, which do not see later ones; None: it sees everything."""
    right_shift_logits: bool
    """Whether the output at position i - 1 predicts token i."""
    sizes: dict[str, int]
    num_parameters: int
    num_active_parameters: int
    """Parameters used to predict one token: all except the routed experts that are not chosen for it."""
    num_layers: int
    sites: tuple[SiteGroup, ...]
    num_fast_parameters: int
    """Number of parameters of one memory (each row has one with a memory per row), kept in float32, or float64 for a
    float64 model."""


SIZES = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key-value heads": "num_key_value_heads",
    "head width": "head_dim",
    "experts": "num_experts",
    "experts per token": "num_experts_per_tok",
    "positions": "max_position_embeddings",
}


def summarise(
    name_or_path: str | Path,
    config: FastWeightsConfig | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ModelSummary:
    """Describe the model `name_or_path` and one memory of `config` (default: the paper's).

    Raises CheckpointError when the configuration cannot be read, ConfigError when a target names no projection.
    """
    config = FastWeightsConfig() if config is None else config
    model = model_skeleton(name_or_path, revision, token)
    sites = find_sites(model, config.targets, config.inner_layer_fraction)
    groups = _grouped(sites, config.adapter())
    family = family_of(model.config)
    return ModelSummary(
        family=model.config.model_type if family is None else family.name,
        model_class=type(model).__name__,
        dtype=str(model.config.dtype or "float32").removeprefix("torch."),
        block_size=block_size_of(model.config),
        right_shift_logits=shift_of(model),
        sizes={word: int(value) for word, field in SIZES.items() if (value := getattr(model.config, field, None))},
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_active_parameters=active_parameters(model),
        num_layers=int(model.config.num_hidden_layers),
        sites=groups,
        num_fast_parameters=sum(group.num_parameters for group in groups),
    )


def _grouped(sites: Sequence[Site], adapter: Adapter) -> tuple[SiteGroup, ...]:
    """Group sites that differ only in their block."""
    groups: dict[tuple[Any, ...], list[tuple[int, Site]]] = {}
    for site in sites:
        parts = site.path.split(".")
        layer = next(int(part) for part in parts if part.isdigit())
        inside = ".".join(parts[parts.index(str(layer)) + 1 :])
        groups.setdefault((inside, site.in_features, site.out_features, site.num_experts), []).append((layer, site))
    return tuple(
        SiteGroup(
            projection=inside,
            in_features=wide,
            out_features=narrow,
            num_experts=experts,
            layers=tuple(layer for layer, _ in members),
            num_parameters=sum(adapter.size(site) for _, site in members),
        )
        for (inside, wide, narrow, experts), members in groups.items()
    )
