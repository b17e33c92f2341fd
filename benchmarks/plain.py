"""The method transcribed as one would first write it down, to compare with: every step a full forward pass.

Full-vocabulary logits at every position and in every pass, a Python loop over the experts, one norm per tensor, read
back by the host. It runs our networks' weights and gives the same numbers as the library (`benchmarks/memory.py`
checks that); nothing is slowed down on purpose.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm.models.blocks.experts import Experts


class LoopedExperts(nn.Module):
    """Experts as a list: each waits for the tokens that chose it."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        self.fast: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def projected(self, name: str, index: int, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        y = x @ weight.T
        if name in self.fast:
            a, b = self.fast[name][index]
            y = y + x @ a.T @ b.T * scale
        return y

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in range(self.experts.num_experts):
            token, place = (expert == index).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            gate, up = self.experts.gate_up_proj[index].chunk(2)
            inputs = x[token]
            inner = F.silu(self.projected("gate_proj", index, inputs, gate, 2.0)) * self.projected(
                "up_proj", index, inputs, up, 2.0
            )
            y = self.projected("down_proj", index, inner, self.experts.down_proj[index], 2.0)
            out = out.index_add(0, token, y * weight[token, place][:, None])
        return out


def loop_experts(model: nn.Module) -> list[LoopedExperts]:
    """Replace the stacked experts of a LLaDA-MoE by loops over the same weights; returns them, one per layer."""
    loops = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.experts = LoopedExperts(layer.mlp.experts)
        loops.append(layer.mlp.experts)
    return loops


def write(
    model: nn.Module,
    loops: list[LoopedExperts],
    clean: Tensor,
    states: list[Tensor],
    start: dict[str, Tensor],
    mask_token_id: int,
    *,
    lr: float = 0.1,
    clip: float = 1.0,
) -> list[float]:
    """Adapt the last layer on `states` (masked sets [B, L]); `start` holds A [E, R, in] of each projection."""
    last = loops[-1]
    values: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, a in start.items():
        wide = last.experts.sizes(name)[1]
        values[name] = [(each.clone(), torch.zeros(wide, a.shape[1])) for each in a]
    losses = []
    for is_masked in states:
        flat = [tensor.detach().requires_grad_() for pairs in values.values() for pair in pairs for tensor in pair]
        it = iter(flat)
        values = {name: [(next(it), next(it)) for _ in pairs] for name, pairs in values.items()}
        last.fast = values
        logits = model(clean.masked_fill(is_masked, mask_token_id)).logits
        nats = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
        loss = (nats * is_masked).sum() / is_masked.sum()
        gradients = torch.autograd.grad(loss, flat, allow_unused=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            continue
        with torch.no_grad():
            for value, gradient in zip(flat, gradients, strict=True):
                if gradient is not None:
                    norm = gradient.norm().item()
                    value -= lr * gradient * min(1.0, clip / (norm + 1e-12))
    last.fast = {name: [(a.detach(), b.detach()) for a, b in pairs] for name, pairs in values.items()}
    return losses


def forget(loops: list[LoopedExperts]) -> None:
    """Drop the fast weights."""
    for each in loops:
        each.fast = {}
