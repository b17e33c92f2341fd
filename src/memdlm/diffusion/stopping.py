"""Rules by which a row, or a block, is finished early."""

import functools
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from memdlm.types import Ids, PositionSet


@final
@dataclass(frozen=True, slots=True)
class EosStop:
    """A row is finished once its text is known up to its first end token: what follows is cut off anyway.

    Exact as long as committed tokens do not change: the sequence up to the end token is that of a full run.
    """

    end_ids: tuple[int, ...]
    is_response: PositionSet
    """[B, T] where an end token counts; one in the prompt does not."""

    def finished(self, ids: Ids, is_open: PositionSet) -> Tensor:
        """Return [B] bool for a canvas `ids` [B, T] in which `is_open` are still masked."""
        is_end = functools.reduce(torch.logical_or, [ids == end for end in self.end_ids])
        is_end = is_end & self.is_response & ~is_open
        # argmax gives the first of equal maxima.
        first_end = is_end.int().argmax(-1)
        is_open = is_open & self.is_response
        first_open = torch.where(is_open.any(-1), is_open.int().argmax(-1), ids.shape[1])
        return is_end.any(-1) & (first_end < first_open)


@final
@dataclass(frozen=True, slots=True)
class StableAnswer:
    """Commit all that is left of a block once its predictions have not changed for `steps` steps. Not exact."""

    steps: int
