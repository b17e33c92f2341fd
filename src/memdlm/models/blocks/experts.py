"""Mixture-of-experts feed-forward: all experts of a layer as stacked tensors, one grouped product per projection.

T tokens, k experts chosen per token, E experts, I expert width, D hidden width, S samples that own a memory.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from memdlm.models.blocks.layers import SelfInitialising

MAX_GROUPS = 1023
"""Groups that one grouped product takes on a GPU (torch refuses 1024 and more)."""
ALIGNED = 16
"""The rows of a grouped product's operands must be multiples of this many bytes."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The T*k (token, expert) pairs sorted by (expert, sample), so that every group is one contiguous slice."""

    order: Tensor
    """[T*k] int64: sorted place -> index into the flattened [T, k] choices."""
    token: Tensor
    """[T*k] int64: sorted place -> token."""
    ends: Tensor
    """[E*S] int32: where each (expert, sample) group ends, expert-major."""
    num_samples: int
    first_sample: int = 0
    """The first of the `num_samples` samples of the memory to which these tokens belong."""

    @property
    def samples(self) -> slice:
        """The samples of the memory to which these tokens belong."""
        return slice(self.first_sample, self.first_sample + self.num_samples)

    @property
    def expert_ends(self) -> Tensor:
        """[E] int32: where each expert's slice ends."""
        return self.ends[self.num_samples - 1 :: self.num_samples].contiguous()

    def restore(self, values: Tensor) -> Tensor:
        """Bring sorted `values` [T*k, D] back to the order of the choices: [T*k, D]."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(self.order.shape[0], device=self.order.device)
        return values[place]


def route(expert: Tensor, num_experts: int, num_samples: int = 1, first_sample: int = 0) -> Routing:
    """Sort the choices `expert` [T, k]; token t belongs to sample first_sample + t // (T / num_samples)."""
    tokens, chosen = expert.shape
    group = expert.flatten()
    if num_samples > 1:
        sample = torch.arange(tokens, device=expert.device) // (tokens // num_samples)
        group = group * num_samples + sample.repeat_interleave(chosen)
    order = group.argsort(stable=True)
    sizes = torch.zeros(num_experts * num_samples, dtype=torch.int64, device=expert.device)
    sizes = sizes.scatter_add(0, group, torch.ones_like(group))
    return Routing(order, order // chosen, sizes.cumsum(0).to(torch.int32), num_samples, first_sample)


def sample_chunks(num_experts: int, num_samples: int) -> list[tuple[int, int]]:
    """Return (first sample, number of samples) of nearly equal parts that have at most `MAX_GROUPS` groups each.

    The parts depend only on the two numbers, so nothing waits for the device. A single sample is never divided.
    """
    parts = -(-num_samples // max(1, MAX_GROUPS // num_experts))
    bounds = [part * num_samples // parts for part in range(parts + 1)]
    return [(start, stop - start) for start, stop in itertools.pairwise(bounds)]


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply every slice of `x` by its own weight: y[a:b] = x[a:b] @ weight[g].T.

    `x` [N, in], `weight` [G, out, in], `ends` [G] int32 ascending, the last one N; empty groups are fine.
    One grouped product where the dtype allows it, otherwise `looped_linear`. Under autocast it is computed in
    autocast's dtype, as a linear layer is: torch has no rule for grouped products.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.shape[0] == 0:
        return x @ weight[0].transpose(0, 1)
    product = _one_product if _has_grouped_product(x, weight) else looped_linear
    if not torch.compiler.is_compiling():
        return product(x, weight, ends)
    # torch.compile knows grouped products in bfloat16 only, and a loop would be unrolled over the tokens' routes.
    if product is looped_linear:
        return _outside_the_graph(product, x, weight, ends)
    if x.dtype == torch.bfloat16:
        return product(x, weight, ends)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _outside_the_graph(product, x, weight, ends)
    return _opaque_product(x, weight, ends)


def _one_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # The kernels take rows of multiples of 16 bytes; others, mostly of a low rank, are filled up with zeros.
    wide, out = (-size % (ALIGNED // x.element_size()) for size in (x.shape[-1], weight.shape[-2]))
    if wide or out:
        x, weight = F.pad(x, (0, wide)), F.pad(weight, (0, wide, 0, out))
    found = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    return found[:, : found.shape[-1] - out] if out else found


@torch.library.custom_op("memdlm::grouped_product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Do what `_one_product` does, hidden from torch.compile, which does not know all dtypes: the graph stays whole.

    Shapes are those of `grouped_linear`; it has no backward pass.
    """
    return _one_product(x, weight, ends)


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.compiler.disable
def _outside_the_graph(product: Callable[..., Tensor], x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return product(x, weight, ends)


def looped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Do what `grouped_linear` does, one group at a time: the oracle, and the path for float64."""
    bounds = [0, *ends.tolist()]
    parts = [
        x[start:end] @ matrix.transpose(0, 1)
        for matrix, start, end in zip(weight, bounds[:-1], bounds[1:], strict=True)
        if end > start
    ]
    # A product over no rows still gives every weight a gradient (zero), as callers expect.
    return torch.cat(parts) if parts else x @ weight[0].transpose(0, 1)


def _has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: no float64, and on a GPU not too many groups."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        return False
    if x.device.type != "cuda":
        return True
    return weight.shape[0] <= MAX_GROUPS and torch.cuda.get_device_capability(x.device)[0] >= 8


class StackedWeight(nn.Module, ABC):
    """Another way to hold one stack of expert weights, in the place of the parameter: quantised, for example."""

    @abstractmethod
    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """Do what `grouped_linear` does with the stack: `x` [N, in] sorted by expert -> [N, out]."""


class ExpertAdapter(nn.Module, ABC):
    """What an outer adapter adds to the expert projections of one layer; its parameters belong to the model."""

    @abstractmethod
    def add(self, projection: str, out: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """Return `out` plus this adapter's part, for `projection` of every pair; `ends` [E] as in `grouped_linear`."""


class ExpertAdditions(ABC):
    """What an open memory adds to the expert projections of one layer; attached from outside."""

    num_samples: int

    @abstractmethod
    def add(self, projection: str, out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """Return `out` plus this memory's part, for `projection` of every pair; `x` [T*k, in], `out` [T*k, out]."""


class Experts(SelfInitialising):
    """E gated feed-forward networks stored as two stacked tensors."""

    projections = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.additions: ExpertAdditions | None = None
        self.adapter: ExpertAdapter | None = None

    def initialise(self, config: Any) -> None:
        """Draw all experts from N(0, initializer_range^2)."""
        init.normal_(self.gate_up_proj, std=config.initializer_range)
        init.normal_(self.down_proj, std=config.initializer_range)

    def sizes(self, projection: str) -> tuple[int, int]:
        """Return (in, out) of one expert's projection."""
        wide, narrow = self.hidden_size, self.intermediate_size
        return (narrow, wide) if projection == "down_proj" else (wide, narrow)

    def weight_of(self, projection: str, expert: int) -> Tensor:
        """Return the weight [out, in] of one expert's projection, a view of the stacked one."""
        if projection == "down_proj":
            return self.down_proj[expert]
        start = self.intermediate_size if projection == "up_proj" else 0
        return self.gate_up_proj[expert, start : start + self.intermediate_size]

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """Return sum_k weight[t, k] * f_{expert[t, k]}(x[t]): `x` [T, D], `expert` and `weight` [T, k] -> [T, D]."""
        # Read once, at the beginning of the call: another thread may open a memory meanwhile.
        added = self.additions
        samples = 1 if added is None else added.num_samples
        chunks = sample_chunks(self.num_experts, samples)
        if len(chunks) == 1:
            return self._mixed(added, x, expert, weight, *chunks[0])
        tokens = [count * (x.shape[0] // samples) for _, count in chunks]
        parts = zip(x.split(tokens), expert.split(tokens), weight.split(tokens), chunks, strict=True)
        return torch.cat([self._mixed(added, some, asked, share, *chunk) for some, asked, share, chunk in parts])

    def _mixed(
        self,
        added: ExpertAdditions | None,
        x: Tensor,
        expert: Tensor,
        weight: Tensor,
        first_sample: int,
        num_samples: int,
    ) -> Tensor:
        """Do what `forward` does, for the tokens of some samples of the memory `added`."""
        routing = route(expert, self.num_experts, num_samples, first_sample)
        ends = routing.expert_ends
        inputs = x[routing.token]
        gate, up = _product(inputs, self.gate_up_proj, ends).chunk(2, dim=-1)
        gate = self._with_additions(added, "gate_proj", gate, inputs, routing, ends)
        up = self._with_additions(added, "up_proj", up, inputs, routing, ends)
        inner = F.silu(gate) * up
        out = _product(inner, self.down_proj, ends)
        out = self._with_additions(added, "down_proj", out, inner, routing, ends)
        # Unsorting and summing over k, unlike an atomic scatter, gives the same bits in every run.
        out = routing.restore(out).unflatten(0, expert.shape)
        return (out * weight[..., None].to(out.dtype)).sum(1)

    def _with_additions(
        self, added: ExpertAdditions | None, projection: str, out: Tensor, x: Tensor, routing: Routing, ends: Tensor
    ) -> Tensor:
        """Add the open memory's part to the base projection, then the outer adapter's."""
        if added is not None:
            out = added.add(projection, out, x, routing)
        return out if self.adapter is None else self.adapter.add(projection, out, x, ends)


def _product(x: Tensor, weight: Tensor | StackedWeight, ends: Tensor) -> Tensor:
    return weight.product(x, ends) if isinstance(weight, StackedWeight) else grouped_linear(x, weight, ends)
