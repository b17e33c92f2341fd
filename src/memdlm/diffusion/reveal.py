"""How many masked tokens each denoising step commits."""

import torch
from torch import Tensor

from memdlm.diffusion.schedules import Schedule
from memdlm.errors import ConfigError


def reveal_counts(
    num_masked: Tensor,
    steps: int,
    *,
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Spread each row's masked tokens over `steps`: [B] -> [B, S'], S' <= steps, int64 on the CPU.

    At step j a masked token survives with probability `schedule.stay_masked((S-j-1)/S, (S-j)/S)`; the expected
    number of the others, rounded half to even, is revealed (with a `generator`: a binomial draw). Steps that
    would reveal nothing are dropped, since the network is not told the time: skipping them is exact. Every
    row's total equals its number of masks.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}.")
    left = num_masked.to("cpu", torch.float64)
    columns = []
    for step in range(steps):
        reveal = 1 - schedule.stay_masked((steps - step - 1) / steps, (steps - step) / steps)
        if generator is None:
            count = (left * reveal).round()
        else:
            count = torch.binomial(left, torch.full_like(left, reveal), generator=generator)
        count = count.minimum(left)
        left = left - count
        columns.append(count)
    counts = torch.stack(columns, dim=1).long()
    # Move the zeros of each row behind its other counts, then cut the columns that are zero in every row.
    order = (counts == 0).to(torch.int8).argsort(dim=1, stable=True)
    counts = counts.gather(1, order)
    width = int((counts > 0).sum(1).max()) if counts.numel() else 0
    return counts[:, :width]
