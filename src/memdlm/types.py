"""Shape letters and tensor aliases used by every signature in the package.

B batch   L sequence length   V vocabulary   D hidden width   R fast-weight rank
N chosen positions, a subset of the B*L   S samples that own a memory (1, or one per batch row)
K inner updates   E experts

A boolean tensor is a *position set*: it is named `is_<adjective>` and is true where the adjective holds.
"Mask" alone is never one, because the field has three of them (attention, [MASK], loss).
"""

from abc import ABC, abstractmethod
from typing import TypeAlias

from torch import Tensor

Ids: TypeAlias = Tensor
"""[B, L] int64 token ids."""
PositionSet: TypeAlias = Tensor
"""[B, L] bool, true at the positions that belong to the set."""
Positions: TypeAlias = Tensor
"""[N] int64, positions of a [B, L] tensor in row-major order (row * L + column), ascending."""
Times: TypeAlias = Tensor
"""[B] float, diffusion time: 0 is clean text, 1 has every maskable token masked."""
Logits: TypeAlias = Tensor
"""[N, V] float."""

IGNORE_INDEX = -100
"""The label of a position that is never masked and never scored."""


class Denoise(ABC):
    """What the diffusion mathematics needs of a network: predictions at chosen positions of a noised text.

    The rows of `ids` may be a whole multiple of the rows the denoiser was made for (several views of one text,
    row-major: views of the same text are neighbours).
    """

    @abstractmethod
    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions`; other positions never reach the vocabulary."""

    @abstractmethod
    def hidden(self, ids: Ids, positions: Positions) -> Tensor:
        """Return [N, D] last hidden states, after the final norm, at `positions`."""
