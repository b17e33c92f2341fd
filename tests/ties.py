"""Whether two canvases differ by a tie alone: by choices between predictions that are equally sure.

Which of two equally sure predictions comes first is nobody's to say; ours is that of the lower column, and of the
lower token. Published code leaves it to the kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memdlm.diffusion import TokenSampler

RELATIVE, ABSOLUTE = 1e-5, 1e-7
"""What float32 leaves of a recorded confidence after a forward pass."""


@dataclass(frozen=True)
class Sureness:
    """What a step chose from: at `positions` [N] of a canvas, the `logits` [N, V], under `rule`."""

    positions: Tensor
    logits: Tensor
    sampler: TokenSampler

    def of(self, position: int, token: int) -> tuple[float, float]:
        """How sure `token` is at `position`, and by how much it is less likely than the likeliest that is allowed."""
        line = self.logits[(self.positions == position).nonzero().item()].float()
        line[list(self.sampler.suppress)] = float("-inf")
        allowed = line.clone()
        allowed[self.sampler.mask_token_id] = float("-inf")
        short = allowed.log_softmax(-1).max() - allowed.log_softmax(-1)[token]
        line[list(self.sampler.postpone)] = float("-inf")
        return self.sampler._filtered(line[None])[0].softmax(-1)[token].item(), short.item()


def is_tie(before: Tensor, mine: Tensor, theirs: Tensor, sureness: Sureness) -> bool:
    """Whether two steps [B, T] from the same canvas `before` [B, T] differ by choices among equals alone."""
    for row in range(len(before)):
        first, second = (_choices(before, after, row) for after in (mine, theirs))
        if len(first) != len(second) or not {place for place, _ in first | second} <= set(sureness.positions.tolist()):
            return False
        ours, others = (
            sorted(sureness.of(*choice) for choice in choices) for choices in (first - second, second - first)
        )
        if any(short > RELATIVE for _, short in ours + others):
            return False
        for (one, _), (other, _) in zip(ours, others, strict=True):
            if abs(one - other) > ABSOLUTE + RELATIVE * max(one, other):
                return False
    return True


def _choices(before: Tensor, after: Tensor, row: int) -> set[tuple[int, int]]:
    """(position in the whole batch, token) of everything that a step changed in a row."""
    columns = (before[row] != after[row]).nonzero().squeeze(1)
    return {(row * before.shape[1] + int(column), int(after[row, column])) for column in columns}


def describe(step: int, mine: Tensor, theirs: Tensor) -> str:
    """One line for a mark."""
    where = torch.nonzero(mine != theirs).tolist()
    return f"from step {step} on the recording differs by a tie: equally sure predictions at [row, column] {where}"
