"""Fast weights of one memory <-> low-rank pairs by published module name, as adapter files hold them.

R rank. A pair is {"A": [R, in], "B": [out, R]}; scale * B A is what the memory adds to the module's weight. Experts
are modules of their own; one that adds exactly nothing needs no pair.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from memdlm.errors import MemoryFileError
from memdlm.finite import is_finite
from memdlm.memory.adapters import Full, LoRA
from memdlm.memory.fast_weights import FastWeights, value_dtype
from memdlm.memory.sites import Site
from memdlm.models.lora.adapters import published_name

NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]*)(?![^.])", re.ASCII)
"""A part of a dotted name that is a number, written in the only way."""

Pair: TypeAlias = dict[str, Tensor]
Pairs: TypeAlias = dict[str, Pair]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One adapted projection, under its published name (that of expert e has e in the place of the star)."""

    name: str
    in_features: int
    out_features: int
    num_experts: int | None

    def modules(self) -> list[str]:
        """Return the published names of its modules, in the order of the experts."""
        return [self.name] if self.num_experts is None else [self.name.replace("*", str(e)) for e in self.experts()]

    def experts(self) -> range:
        """Return the experts' numbers."""
        return range(self.num_experts or 0)


def layers_of(fast: FastWeights) -> list[Layer]:
    """Return the published layers of the sites, in order."""
    return [
        Layer(
            name=_published(site, fast.network),
            in_features=site.in_features,
            out_features=site.out_features,
            num_experts=site.num_experts,
        )
        for site in fast.sites
    ]


def _published(site: Site, network: nn.Module) -> str:
    if site.num_experts is None:
        return published_name(network, site.path)
    experts, _, projection = site.path.rpartition(".")
    # Renaming needs a number where the expert's stands.
    head, _, tail = published_name(network, f"{experts}.0.{projection}").rpartition(".0.")
    return f"{head}.*.{tail}"


def pack(fast: FastWeights, row: int) -> tuple[int, Pairs]:
    """Return the rank and the pairs of sample `row`, copied to the CPU."""
    layers = layers_of(fast)
    values = [
        [tensor.detach().select(-3, row).to("cpu", copy=True) for tensor in fast.read(site.path)] for site in fast.sites
    ]
    if isinstance(fast.adapter, Full):
        rank = max(min(layer.in_features, layer.out_features) for layer in layers)
        values = [list(_factored(delta, rank)) for (delta,) in values]
    else:
        rank = values[0][0].shape[-2]
    pairs: Pairs = {}
    for layer, (a, b) in zip(layers, values, strict=True):
        if layer.num_experts is None:
            pairs[layer.name] = {"A": a.contiguous(), "B": b.contiguous()}
            continue
        is_used = a.flatten(1).any(1) & b.flatten(1).any(1)
        for e, module in enumerate(layer.modules()):
            if is_used[e]:
                pairs[module] = {"A": a[e].contiguous(), "B": b[e].contiguous()}
    if not pairs:  # an adapter file cannot be empty
        a, b = values[0]
        pairs[layers[0].modules()[0]] = {"A": a[0].contiguous(), "B": b[0].contiguous()}
    return rank, pairs


def _factored(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [.., R, in] and B [.., out, R] with B A = delta to the bit: one of them is an identity."""
    out, wide = delta.shape[-2:]
    a = delta.new_zeros(*delta.shape[:-2], rank, wide)
    b = delta.new_zeros(*delta.shape[:-2], out, rank)
    if wide <= out:
        a[..., :wide, :] = torch.eye(wide, dtype=delta.dtype)
        b[..., :wide] = delta
    else:
        a[..., :out, :] = delta
        b[..., :out] = torch.eye(out, dtype=delta.dtype)
    return a, b


def check_pairs(pairs: Mapping[str, Pair], layers: Sequence[Layer], rank: int, where: str) -> None:
    """Raise MemoryFileError unless `pairs` are those of `layers`, in finite numbers; only experts may be left out."""
    by_name = {layer.name: layer for layer in layers}
    owners = {module: _owner(module, by_name) for module in pairs}
    for module, layer in owners.items():
        if layer is None:
            raise MemoryFileError(f"{where}: {module} is none of the adapted projections; a tensor was renamed.")
        for side, size in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            tensor = pairs[module][side]
            if tuple(tensor.shape) != size:
                raise MemoryFileError(f"{where}: {module}.lora_{side} has shape {tuple(tensor.shape)}, not {size}.")
            if not tensor.is_floating_point():
                raise MemoryFileError(f"{where}: {module}.lora_{side} has numbers of {tensor.dtype}.")
    for layer in layers:
        if layer.num_experts is None and layer not in owners.values():
            raise MemoryFileError(f"{where}: the tensors of {layer.name} are missing.")
    unsound = first_unsound(pairs)
    if unsound is not None:
        raise MemoryFileError(f"{where}: {unsound} holds NaN or infinity; the memory cannot be read.")


def _owner(module: str, layers: Mapping[str, Layer]) -> Layer | None:
    """Return the layer that `module` belongs to; however many experts that has, their names are not listed."""
    if module in layers:
        return layers[module] if layers[module].num_experts is None else None
    for number in NUMBER.finditer(module):
        layer = layers.get(f"{module[: number.start()]}*{module[number.end() :]}")
        if layer is not None and len(number[0]) < 10 and int(number[0]) < (layer.num_experts or 0):
            return layer
    return None


def first_unsound(pairs: Mapping[str, Pair]) -> str | None:
    """Return the name of a tensor that holds NaN or infinity; None: there is none."""
    for module, pair in pairs.items():
        for side, tensor in pair.items():
            if not bool(is_finite(tensor)):
                return f"{module}.lora_{side}"
    return None


def unpack(pairs: Mapping[str, Pair], rank: int, fast: FastWeights) -> list[Tensor]:
    """Return the values of one sample, in the order of `FastWeights.tensors`, where each site computes."""
    tensors = []
    for site, layer in zip(fast.sites, layers_of(fast), strict=True):
        dtype = value_dtype(site)
        nothing = {
            "A": torch.zeros(rank, layer.in_features, dtype=dtype),
            "B": torch.zeros(layer.out_features, rank, dtype=dtype),
        }
        found = [pairs.get(module, nothing) for module in layer.modules()]
        # Multiplied on the CPU: in full precision, and the same everywhere.
        if isinstance(fast.adapter, LoRA):
            values = [[pair[side].to(dtype) for pair in found] for side in ("A", "B")]
        else:
            values = [[pair["B"].to(dtype) @ pair["A"].to(dtype) for pair in found]]
        for each in values:
            joined = each[0] if layer.num_experts is None else torch.stack(each)
            tensors.append(joined.unsqueeze(-3).to(site.device, non_blocking=True))
    return tensors
