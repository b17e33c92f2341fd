"""Dropout on what fast weights read, while a state is learned."""

from typing import final

from torch import Tensor

from memdlm.randomness import branched, number_of, numbers


@final
class InputDropout:
    """Zeroes inputs at random and scales the others up.

    The zeros follow from (sample's seed, update, site) alone: a layer that gradient checkpointing runs again gets the
    same ones, and a sample gets in a padded batch what it gets alone.
    """

    def __init__(self, rate: float, seeds: Tensor) -> None:
        self.rate, self.seeds = rate, seeds
        self.update = 0

    def factors(self, path: str, count: int, x: Tensor, samples: slice = slice(None)) -> Tensor:
        """Return [S, count, width] factors (0 or 1 / (1 - rate)) for the inputs of site `path`; `x` [..., width].

        `samples` says whose: all of them, or some.
        """
        seeds = branched(self.seeds[samples].to(x.device), number_of("dropout", self.update, path))
        drawn = numbers(seeds, (len(seeds), count, x.shape[-1]))
        return (drawn >= self.rate).to(x.dtype) / (1 - self.rate)
