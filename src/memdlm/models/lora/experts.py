"""Outer LoRA on stacked experts: every expert has its own low-rank pair, applied as grouped products.

E experts, R rank, N = T*k sorted (token, expert) pairs. No expert's weight change is ever formed.
"""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn

from memdlm.models.blocks.experts import ExpertAdapter, Experts, grouped_linear


@final
class ExpertLoRA(ExpertAdapter):
    """out + scale * B_e A_e dropout(x) for chosen projections, computed in the adapter's dtype as PEFT does."""

    def __init__(
        self,
        experts: Experts,
        projections: Iterable[str],
        *,
        rank: int,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        device = next(experts.parameters()).device
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for projection in projections:
            wide, narrow = experts.sizes(projection)
            shape_a, shape_b = (experts.num_experts, rank, wide), (experts.num_experts, narrow, rank)
            self.lora_A[projection] = nn.Parameter(torch.zeros(shape_a, dtype=dtype, device=device))
            self.lora_B[projection] = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=device))

    def add(self, projection: str, out: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """Add this adapter's part; projections without one pass through."""
        if projection not in self.lora_A:
            return out
        a, b = self.lora_A[projection], self.lora_B[projection]
        dtype = a.dtype
        if torch.is_autocast_enabled(x.device.type):
            # Cast here, so that the grouped product knows the dtype whose alignment it must check.
            dtype = torch.get_autocast_dtype(x.device.type)
        inner = grouped_linear(self.dropout(x.to(dtype)), a.to(dtype), ends)
        return (out + grouped_linear(inner, b.to(dtype), ends) * self.scale).to(out.dtype)

    @torch.no_grad()
    def merge_into(self, experts: Experts) -> None:
        """Add every B_e A_e to its expert's weight, one expert at a time, rounding once."""
        for projection in self.lora_A:
            for e in range(experts.num_experts):
                delta = self.lora_B[projection][e] @ self.lora_A[projection][e] * self.scale
                part = experts.weight_of(projection, e)
                part.copy_(part.to(delta.dtype) + delta)
