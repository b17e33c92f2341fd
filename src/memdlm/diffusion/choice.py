"""Logits -> tokens: filters, temperature, which tokens are ruled out, and how sure a prediction is."""

import functools
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

    @abstractmethod
    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return [N] confidences of `token` [N] under `logits` [N, V]."""


@final
@dataclass(frozen=True, slots=True)
class LowConfidence(Confidence):
    """The probability of the predicted token, in float32 so that bf16 ties cannot decide; unsure tokens stay masked."""

    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return softmax(logits) at `token`."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.gather(-1, token[:, None]).squeeze(1).sub(wide.logsumexp(-1)).exp()


@final
@dataclass(frozen=True, slots=True)
class RandomOrder(Confidence):
    """Uniform noise: tokens are committed in random order."""

    draws: ClassVar[bool] = True

    def confidence(self, logits: Logits, token: TokenIds, draw: Draw | None) -> Values:
        """Return U[0, 1) draws."""
        if draw is None:
            raise ConfigError("remasking 'random' draws the order: pass a generator.")
        return draw((), torch.float32)


CONFIDENCES: dict[str, type[Confidence]] = {"low_confidence": LowConfidence, "random": RandomOrder}


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
    """Confidences are read at the sampling temperature (LLaDA2.x) instead of at 1 (LLaDA)."""

    @property
    def draws(self) -> bool:
        """Whether random numbers decide over tokens or over their order."""
        return self.temperature > 0 or self.remasking.draws

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
        if self.postpone:
            scaled = scaled.index_fill(-1, ids_on(self.postpone, logits.device), float("-inf"))
        # Confidences count the mask token's probability, as published: where it is high, no other token is sure.
        return token, self.remasking.confidence(self._filtered(scaled), token, draw)

    def _filtered(self, logits: Logits) -> Logits:
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ranked, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
            is_beyond = ranked.cumsum(-1) - ranked > self.top_p
            logits = logits.masked_fill(torch.zeros_like(is_beyond).scatter(-1, order, is_beyond), float("-inf"))
        return logits


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
    uniform = draw((logits.shape[-1],), torch.float64)
    noise = -torch.log(-torch.log(uniform))
    return logits.double() / temperature + noise
