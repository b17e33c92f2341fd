"""Dropout on what fast weights read, while a state is learned."""

from typing import final

import torch
from torch import Tensor

from memdlm.randomness import branched, number_of, numbers


@final
class InputDropout:
    """Zeroes inputs at random and scales the others up.

    The zeros follow from (sample's seed, row of the sample, update, site) alone: a layer that gradient checkpointing
    runs again gets the same ones, and a sample gets in a padded batch what it gets alone.
    """

    def __init__(self, rate: float, seeds: Tensor) -> None:
        self.rate, self.seeds = rate, seeds
        self.update = 0

    def factors(self, path: str, count: int, x: Tensor, rows: int, samples: slice = slice(None)) -> Tensor:
        """Return [S, count, width] factors (0 or 1 / (1 - rate)) for the inputs of site `path`; `x` [..., width].

        The `count` inputs of a sample are those of so many `rows`. `samples` says whose: all of them, or some.
        """
        seeds = branched(self.seeds[samples].to(x.device), number_of("dropout", self.update, path))
        # A stream for every row: counted through, the numbers of the second would depend on the padding of the first.
        streams = branched(seeds.repeat_interleave(rows), torch.arange(rows, device=x.device).repeat(len(seeds)))
        drawn = numbers(streams, (len(streams), count // rows, x.shape[-1])).view(len(seeds), count, x.shape[-1])
        return (drawn >= self.rate).to(x.dtype) / (1 - self.rate)
