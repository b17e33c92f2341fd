"""What a fast weight is: low-rank or full additions to a projection, for one memory or one per sample.

Every tensor is [S, ...] for a linear layer and [E, S, ...] for stacked experts: the sample is always the third
dimension from the end, so updates, norms and clips treat both alike.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from memdlm.errors import ConfigError
from memdlm.memory.sites import Site
from memdlm.models.blocks.experts import grouped_linear
from memdlm.randomness import Randomness, uniform


class Adapter(ABC):
    """How fast weights are created and applied. `names` are the tensors' names, in order."""

    names: tuple[str, ...]
    scale: float = 1.0
    """What the product of the tensors is multiplied by."""

    @abstractmethod
    def size(self, site: Site) -> int:
        """Return how many numbers one memory has at `site`."""

    @abstractmethod
    def start(self, site: Site, num_samples: int, randomness: Randomness, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the tensors of `site` before a write; they add nothing yet."""

    @abstractmethod
    def linear(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return what is added to a linear layer's output: `x` [S, n, in] -> [S, n, out]."""

    @abstractmethod
    def grouped(self, x: Tensor, tensors: tuple[Tensor, ...], ends: Tensor) -> Tensor:
        """Return what is added to an expert projection: `x` [N, in] sorted by (expert, sample) -> [N, out]."""


@final
@dataclass(frozen=True, slots=True)
class LoRA(Adapter):
    """(alpha / rank) B A x, with A Kaiming-uniform (a = sqrt 5) and B = 0 at the start."""

    names = ("lora_A", "lora_B")

    inner_rank: int = 32
    inner_alpha: float = 64.0

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Alpha over rank."""
        return self.inner_alpha / self.inner_rank

    def size(self, site: Site) -> int:
        """Count A and B."""
        return self.inner_rank * (site.in_features + site.out_features) * (site.num_experts or 1)

    def start(self, site: Site, num_samples: int, randomness: Randomness, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Draw A uniformly from +-1/sqrt(in); one generator draws it once for all samples."""
        bound = site.in_features**-0.5
        per_sample = not isinstance(randomness, torch.Generator)
        rows = (num_samples,) if per_sample else (1,)
        experts = () if site.num_experts is None else (site.num_experts,)
        drawn = uniform((*rows, *experts, self.inner_rank, site.in_features), randomness, site.device).to(dtype)
        if experts:
            drawn = drawn.transpose(0, 1)
        a = (drawn * 2 - 1) * bound
        a = a.expand(*site.shape(num_samples), -1, -1).contiguous()
        b = torch.zeros(*site.shape(num_samples), site.out_features, self.inner_rank, dtype=dtype, device=site.device)
        return a, b

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Two batched products."""
        a, b = (tensor.to(x.dtype).transpose(-1, -2) for tensor in tensors)
        return x @ a @ b * self.scale

    def grouped(self, x: Tensor, tensors: tuple[Tensor, ...], ends: Tensor) -> Tensor:
        """Two grouped products over (expert, sample)."""
        a, b = (tensor.to(x.dtype).flatten(0, 1) for tensor in tensors)
        return grouped_linear(grouped_linear(x, a, ends), b, ends) * self.scale


@final
@dataclass(frozen=True, slots=True)
class Full(Adapter):
    """An additive matrix, zero at the start."""

    names = ("delta",)

    def size(self, site: Site) -> int:
        """Count the matrix."""
        return site.in_features * site.out_features * (site.num_experts or 1)

    def start(self, site: Site, num_samples: int, randomness: Randomness, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return zeros; draws nothing."""
        shape = (*site.shape(num_samples), site.out_features, site.in_features)
        return (torch.zeros(shape, dtype=dtype, device=site.device),)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """One batched product."""
        return x @ tensors[0].to(x.dtype).transpose(-1, -2)

    def grouped(self, x: Tensor, tensors: tuple[Tensor, ...], ends: Tensor) -> Tensor:
        """One grouped product over (expert, sample)."""
        return grouped_linear(x, tensors[0].to(x.dtype).flatten(0, 1), ends)


ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "full": Full}


def check_rows(rows: int, num_samples: int) -> None:
    """Raise ConfigError unless `rows` of a batch can be shared out among the samples of an open memory."""
    if rows % num_samples:
        raise ConfigError(
            f"the open memory holds {num_samples} samples, but the model was called with {rows} rows. Call it with "
            f"{num_samples} rows (row i reads memory i), or a whole multiple of them."
        )
