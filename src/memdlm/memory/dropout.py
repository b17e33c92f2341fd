"""Dropout on what fast weights read, while a state is learned."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from memdlm.randomness import derive


@final
class InputDropout:
    """Zeroes inputs at random and scales the others up.

    The zeros follow from (sample's seed, update, site) alone: a layer that gradient checkpointing runs again gets the
    same ones, and a sample gets in a padded batch what it gets alone.
    """

    def __init__(self, rate: float, seeds: Sequence[int]) -> None:
        self.rate, self.seeds = rate, tuple(seeds)
        self.update = 0

    def factors(self, path: str, count: int, x: Tensor, samples: slice = slice(None)) -> Tensor:
        """Return [S, count, width] factors (0 or 1 / (1 - rate)) for the inputs of site `path`; `x` [..., width].

        `samples` says whose: all of them, or some.
        """
        kept = []
        for seed in self.seeds[samples]:
            generator = torch.Generator(device=x.device)
            generator.manual_seed(derive(seed, "dropout", self.update, path).initial_seed())
            drawn = torch.rand(count, x.shape[-1], generator=generator, device=x.device)
            kept.append(drawn >= self.rate)
        return torch.stack(kept).to(x.dtype) / (1 - self.rate)
