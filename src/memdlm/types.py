"""Shape letters and tensor aliases used by every signature in the package.

B batch   L sequence length   V vocabulary   D hidden width   R fast-weight rank
N chosen positions, a subset of the B*L   S samples that own a memory (1, or one per batch row)
K inner updates   E experts

A boolean tensor is a *position set*: it is named `is_<adjective>` and is true where the adjective holds.
"Mask" alone is never one, because the field has three of them (attention, [MASK], loss).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor

Ids: TypeAlias = Int64[Tensor, "B L"]
"""Token ids."""
TextIds: TypeAlias = Int64[Tensor, "P"]
"""Token ids of one text."""
ContextIds: TypeAlias = Int64[Tensor, "B C"]
"""Token ids of texts beside those of a batch."""
ContextSet: TypeAlias = Bool[Tensor, "B C"]
"""True at the positions of such texts that belong to the set."""
PositionSet: TypeAlias = Bool[Tensor, "B L"]
"""True at the positions that belong to the set."""
Positions: TypeAlias = Int64[Tensor, "N"]
"""Positions of a [B, L] tensor in row-major order (row * L + column), ascending."""
TokenIds: TypeAlias = Int64[Tensor, "N"]
"""Token ids at chosen positions."""
Counts: TypeAlias = Num[Tensor, "B"]
"""Positions per text, in any dtype."""
Draws: TypeAlias = Float[Tensor, "B L"]
"""Uniform numbers, one per position."""
Times: TypeAlias = Float[Tensor, "B"]
"""Diffusion time: 0 is clean text, 1 has every maskable token masked."""
PartTimes: TypeAlias = Float[Tensor, "B P"]
"""One diffusion time for each of the P parts (blocks) of a text; P = 1: the whole text has one."""
OfParts: TypeAlias = Num[Tensor, "B P"]
"""One number per part of a text."""
ViewSet: TypeAlias = Bool[Tensor, "_ L"]
"""True at the positions that belong to the set, for some views of each text."""
ViewTimes: TypeAlias = Float[Tensor, "_"]
"""Diffusion times of some views of each text."""
Logits: TypeAlias = Float[Tensor, "N V"]
"""Logits of chosen positions."""
Features: TypeAlias = Float[Tensor, "N D"]
"""Hidden states of chosen positions."""
Values: TypeAlias = Float[Tensor, "N"]
"""One number per chosen position."""
OfTexts: TypeAlias = Float[Tensor, "B"]
"""One number per text."""
OfSamples: TypeAlias = Float[Tensor, "S"]
"""One number per memory."""
Elementwise: TypeAlias = Float[Tensor, "*shape"]
"""The shape of an input that the output shares."""

Project: TypeAlias = Callable[[Tensor], Tensor]
"""Turns features [n, D] into logits [n, V]."""
PerToken: TypeAlias = Callable[[Tensor, slice, Project], Tensor]
"""(features [n, D], which of the N positions they are, project) -> [n] values, each of its own position alone."""


class TokenLoss(ABC):
    """A `PerToken` that is a function of the logits and knows its own derivative."""

    def __call__(self, features: Tensor, chosen: slice, project: Project) -> Tensor:
        """Project the features to logits, then return their `values`."""
        return self.values(project(features), chosen)

    @abstractmethod
    def values(self, logits: Tensor, chosen: slice) -> Tensor:
        """Return [n] values for `logits` [n, V]."""

    @abstractmethod
    def consume(self, logits: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
        """Return (values [n], their derivative [n, V] by `logits`); may overwrite `logits`, and records no graph."""


IGNORE_INDEX = -100
"""The label of a position that is never masked and never scored."""


class Denoise(ABC):
    """What the diffusion mathematics needs of a network: predictions at chosen positions of a noised text.

    `ids` may have a multiple of the rows that the denoiser was made for: several views of each text, with the views of
    one text next to each other.
    """

    @abstractmethod
    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions`; other positions never reach the vocabulary.

        `positions` may be on the CPU, where a decoding loop has them.
        """

    @abstractmethod
    def hidden(self, ids: Ids, positions: Positions) -> Features:
        """Return [N, D] last hidden states, after the final norm, at `positions`."""

    def features(self, ids: Ids, positions: Positions) -> Tensor:
        """Return what `read` hands to a `PerToken`, one row per position; here the logits [N, V]."""
        return self.logits(ids, positions)

    def read(self, ids: Ids, positions: Positions, per_token: PerToken) -> Tensor:
        """Return [N] values, `per_token` at every position; a network may take the positions in several chunks."""
        return per_token(self.features(ids, positions), slice(0, positions.shape[0]), _as_it_is)

    def read_sum(self, ids: Ids, positions: Positions, per_token: PerToken, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the sum [] of `weights` [N] times `read`, the values [N] without gradient); differentiable once."""
        values = self.read(ids, positions, per_token)
        return (values * weights.to(values.dtype)).sum(), values.detach()


def _as_it_is(logits: Tensor) -> Tensor:
    return logits
