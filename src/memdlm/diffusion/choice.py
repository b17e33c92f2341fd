"""Logits -> tokens: filters, temperature, which tokens are ruled out, and how sure a prediction is."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias, final

import torch
from torch import Tensor

from memdlm.errors import ConfigError, unknown
from memdlm.randomness import Randomness, branched, numbers, seed_tensor
from memdlm.types import Logits, TokenIds, Values

Draw: TypeAlias = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""(trailing shape, dtype) -> [N, *shape] draws from U[0, 1), one line per scored position."""


class Confidence(ABC):
    """How sure a prediction is; the surest are committed first."""

    draws: ClassVar[bool] = False
    """Whether random numbers decide."""
    compares: ClassVar[bool] = True
    """Whether a surer prediction is committed first; otherwise the order does not depend on the predictions."""

    @abstractmethod
    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return [N] confidences of `token` [N] under `logits` [N, V]."""

    def spread(self, vocabulary: int) -> float:
        """Return by how much the confidences of a whole distribution over so many tokens can differ.

        It is 0 for a confidence that looks at the token alone.
        """
        return 0.0


@final
@dataclass(frozen=True, slots=True)
class LowConfidence(Confidence):
    """The probability of the predicted token, in float32 so that bf16 ties cannot decide; unsure tokens stay masked."""

    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return softmax(logits) at `token`."""
        wide = _wide(logits)
        return wide.gather(-1, token[:, None]).squeeze(1).sub(wide.logsumexp(-1)).exp()


@final
@dataclass(frozen=True, slots=True)
class RandomOrder(Confidence):
    """Uniform noise: tokens are committed in random order."""

    draws: ClassVar[bool] = True
    compares: ClassVar[bool] = False

    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return U[0, 1) draws."""
        if draw is None:
            raise ConfigError("remasking 'random' draws the order: pass a generator.")
        return draw((), torch.float32)


@final
@dataclass(frozen=True, slots=True)
class Margin(Confidence):
    """How much likelier the likeliest token is than the second (Dream's `topk_margin`), whichever was drawn."""

    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return p1 - p2 of softmax(logits)."""
        best = _wide(logits).softmax(-1).topk(min(2, logits.shape[-1]), dim=-1).values
        return best[:, 0] - best[:, 1:].sum(-1)

    def spread(self, vocabulary: int) -> float:
        """Return 1."""
        return 1.0


LEAST_PROBABILITY = 1e-10
"""Added to a probability before its logarithm, as published."""


@final
@dataclass(frozen=True, slots=True)
class NegativeEntropy(Confidence):
    """How concentrated the distribution over the vocabulary is (Dream's `entropy`), whichever token was drawn."""

    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return the sum of p log p over softmax(logits), in nats: at most 0."""
        p = _wide(logits).softmax(-1)
        return (p * (p + LEAST_PROBABILITY).log()).sum(-1)

    def spread(self, vocabulary: int) -> float:
        """Return the entropy of a uniform distribution."""
        return math.log(max(2, vocabulary))


@final
@dataclass(frozen=True, slots=True)
class LeftToRight(Confidence):
    """Tokens are committed from left to right (SDAR's `sequential`)."""

    compares: ClassVar[bool] = False

    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return 0 everywhere: what is equally sure is committed in the order of the columns."""
        return torch.zeros(token.shape, dtype=torch.float32, device=token.device)


def _wide(logits: Logits) -> Logits:
    return logits if logits.dtype == torch.float64 else logits.float()


CONFIDENCES: dict[str, type[Confidence]] = {
    "low_confidence": LowConfidence,
    "random": RandomOrder,
    "topk_margin": Margin,
    "entropy": NegativeEntropy,
    "sequential": LeftToRight,
}


def make_confidence(name: str) -> Confidence:
    """Return what is called `name` (`remasking`); raises ConfigError with the possible names."""
    if name not in CONFIDENCES:
        raise ConfigError(unknown("remasking:", name, CONFIDENCES))
    return CONFIDENCES[name]()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSampler:
    """How a step turns logits into tokens and confidences. The mask token is never chosen."""

    mask_token_id: int
    remasking: Confidence = field(default_factory=LowConfidence)
    temperature: float = 0.0
    """0: the most likely token; otherwise a sample from softmax(logits / temperature)."""
    top_k: int | None = None
    """Only the k likeliest tokens (and what ties with the last of them) count."""
    top_p: float | None = None
    """Only the likeliest tokens count: those whose likelier tokens together hold at most this much probability."""
    suppress: tuple[int, ...] = ()
    """Tokens that are never predicted."""
    postpone: tuple[int, ...] = ()
    """Tokens whose confidence counts as 0: they are committed only when nothing else is left."""
    is_tempered: bool = False
    """Confidences are read at the sampling temperature (LLaDA2.x, Dream, SDAR) instead of at 1 (LLaDA)."""
    is_filtered: bool = True
    """Confidences are read after top_k and top_p; otherwise of all tokens (SDAR)."""
    is_top_p_first: bool = False
    """top_p is taken of all tokens, and top_k of what is left (Dream); otherwise top_k comes first."""
    alg_temp: float = 0.0
    """Above 0: positions are drawn, without replacement, from softmax(confidence / alg_temp) (Dream)."""

    @property
    def draws(self) -> bool:
        """Whether random numbers decide over tokens or over their order."""
        return self.temperature > 0 or self.remasking.draws or self.alg_temp > 0

    def choose(
        self, logits: Logits, generator: Randomness | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (token [N], confidence [N]) for `logits` [N, V].

        With one generator per row, `rows` [N] (ascending) names the row of each line: a row's draws are then those it
        would get alone. Raises ConfigError when something must be drawn and there is no generator.
        """
        draw = None if generator is None else _drawer(generator, rows, logits)
        if self.suppress:
            logits = logits.index_fill(-1, ids_on(self.suppress, logits.device), float("-inf"))
        scaled = logits / self.temperature if self.is_tempered and self.temperature > 0 else logits
        allowed = scaled.index_fill(-1, ids_on((self.mask_token_id,), logits.device), float("-inf"))
        heat = 1.0 if self.is_tempered and self.temperature > 0 else self.temperature
        token = _gumbel(self._filtered(allowed), heat, draw).argmax(-1)
        return token, self._ranked(self._confidence(scaled, token, draw), draw)

    def _confidence(self, scaled: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return [N] confidences; they count the mask token's probability, as published."""
        spread = self.remasking.spread(scaled.shape[-1])
        # Where the mask token is the likeliest, no other token is sure. What looks at the token itself sees that;
        # the others must be told, or they would commit the second choice as early as the first.
        late = spread * (scaled.argmax(-1) == self.mask_token_id) if spread else None
        if self.postpone:
            postponed = ids_on(self.postpone, scaled.device)
            late = None if late is None else late + 2 * spread * torch.isin(token, postponed)
            scaled = scaled.index_fill(-1, postponed, float("-inf"))
        sure = self.remasking.confidence(self._filtered(scaled) if self.is_filtered else scaled, token, draw)
        return sure if late is None else sure - late

    def _ranked(self, sure: Values, draw: Draw | None) -> Values:
        """Return what orders the positions: `sure` [N], or keys whose falling order is a draw (Gumbel top-k)."""
        if self.alg_temp == 0:
            return sure
        if draw is None:
            raise ConfigError(f"alg_temp {self.alg_temp} draws the order: pass a generator.")
        drawn = sure.double() / self.alg_temp + _gumbel_noise((), draw)
        return drawn.clamp_min(torch.finfo(drawn.dtype).min)  # -inf stands for what was not predicted

    def _filtered(self, logits: Logits) -> Logits:
        if self.is_top_p_first:
            return self._within_top_k(self._within_top_p(logits))
        return self._within_top_p(self._within_top_k(logits))

    def _within_top_k(self, logits: Logits) -> Logits:
        if self.top_k is None:
            return logits
        least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        return logits.masked_fill(logits < least, float("-inf"))

    def _within_top_p(self, logits: Logits) -> Logits:
        if self.top_p is None or self.top_p >= 1:
            return logits
        ranked, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        # The first token that crosses the threshold is kept.
        is_beyond = torch.nn.functional.pad(ranked.cumsum(-1)[..., :-1] > self.top_p, (1, 0))
        return logits.masked_fill(torch.zeros_like(is_beyond).scatter(-1, order, is_beyond), float("-inf"))


@functools.lru_cache(maxsize=64)
def ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `ids` as a tensor on `device`, copied there once."""
    with torch.inference_mode(False):  # a cached tensor must not be bound to its first caller's mode
        return torch.tensor(ids).to(device, non_blocking=True)


def _drawer(generator: Randomness, rows: Tensor | None, logits: Logits) -> Draw:
    """Return a function that draws for every line of `logits` [N, V], with one number of each generator, whatever N."""
    count, device = logits.shape[0], logits.device
    if isinstance(generator, torch.Generator):
        owners, row_of, place_of = [generator], torch.zeros(count, dtype=torch.int64), torch.arange(count)
    elif rows is None:
        raise ConfigError("generator: one per row was given, but not the row of each position; pass rows.")
    else:
        known, row_of, sizes = rows.cpu().unique_consecutive(return_inverse=True, return_counts=True)
        owners = [generator[row] for row in known.tolist()]
        place_of = torch.arange(count) - (sizes.cumsum(0) - sizes)[row_of]

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Every row has its own stream of numbers, and every position in the row a branch of that stream.
        seeds = seed_tensor(len(owners), owners, device) if count else torch.zeros(1, dtype=torch.int64, device=device)
        there = [each.to(device, non_blocking=True) for each in (row_of, place_of)]
        return numbers(branched(seeds[there[0]], there[1]), (count, *shape), dtype)

    return draw


def _gumbel(logits: Logits, temperature: float, draw: Draw | None) -> Tensor:
    if temperature == 0:
        return logits
    if draw is None:
        raise ConfigError(f"temperature {temperature} draws tokens: pass a generator.")
    return logits.double() / temperature + _gumbel_noise((logits.shape[-1],), draw)


def _gumbel_noise(shape: tuple[int, ...], draw: Draw) -> Tensor:
    return -torch.log(-torch.log(draw(shape, torch.float64)))
