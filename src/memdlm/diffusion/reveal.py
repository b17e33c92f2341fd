"""How many masked tokens each denoising step commits: fixed schedules, and rules that look at the confidence."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from memdlm.diffusion.schedules import Linear, Schedule
from memdlm.errors import ConfigError
from memdlm.randomness import Randomness, on_the_host


class Reveal(ABC):
    """Decides how many of a row's predictions, surest first, a step commits."""

    @abstractmethod
    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Return [B, S] int64 on the CPU: how many tokens row i commits in step j of a block.

        The block begins with `num_open` [B] open positions. S bounds the steps; the quotas of a row add up to
        `num_open` or more.
        """

    @property
    def is_fixed(self) -> bool:
        """Whether the quotas alone say how many are committed."""
        return type(self).count is Reveal.count

    def count(self, confidence: Tensor, quota: Tensor) -> Tensor:
        """Return [B]: how many to commit, given `confidence` [B, W] in falling order, -inf where nothing is open."""
        return quota


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduled(Reveal):
    """The noise schedule run backwards in `steps` steps (dLLM), see `reveal_counts`."""

    steps: int
    schedule: Schedule = field(default_factory=Linear)
    is_stochastic: bool = False
    """Draw the counts instead of rounding their expectation."""

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Spread the open tokens."""
        if self.is_stochastic and generator is None:
            raise ConfigError("stochastic_transfer draws how many tokens a step commits: pass a generator.")
        draws = generator if self.is_stochastic else None
        return reveal_counts(num_open, self.steps, schedule=self.schedule, generator=draws)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Even(Reveal):
    """Equal shares; the first steps take one more until the remainder is used up (LLaDA)."""

    steps: int

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Spread the open tokens."""
        step = torch.arange(self.steps)
        left = num_open.cpu()[:, None]
        quotas = left // self.steps + (step < left % self.steps).long()
        return quotas[:, : int((quotas > 0).sum(1).max()) if quotas.numel() else 0]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Truncated(Reveal):
    """The linear schedule from time 1 to `eps`, each count rounded down (Dream), see `dream_counts`."""

    steps: int
    eps: float = 1e-3
    is_stochastic: bool = False
    """Draw the counts: each masked token is committed with the step's probability (Dream's `origin`)."""
    keeps_empty: bool = False
    """Steps that commit nothing are made, too; it matters only where a prediction itself changes what follows."""

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Spread the open tokens."""
        if self.is_stochastic and generator is None:
            raise ConfigError("stochastic_transfer draws how many tokens a step commits: pass a generator.")
        counts = dream_counts(num_open, self.steps, eps=self.eps, generator=generator if self.is_stochastic else None)
        return counts if self.keeps_empty else _without_empty(counts)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Shares(Reveal):
    """An even share of `block_size` tokens in every step, also where only a part of the block is open (SDAR)."""

    block_size: int
    steps: int

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Spread a whole block; the larger shares come first."""
        return _shares(self.block_size, self.steps, num_open.shape[0])


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Above(Reveal):
    """All predictions surer than `threshold`, but no fewer than an even share of `block_size` (LLaDA2.x, SDAR)."""

    threshold: float
    block_size: int
    steps: int

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Spread a whole block, even if only a part of it is open; the larger shares come first."""
        return _shares(self.block_size, self.steps, num_open.shape[0])

    def count(self, confidence: Tensor, quota: Tensor) -> Tensor:
        """Return the number of sure predictions, at least `quota`."""
        return (confidence > self.threshold).sum(-1).maximum(quota)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class AtLeast(Reveal):
    """All predictions surer than `threshold`, but no fewer than `num_to_transfer` (LLaDA2.1)."""

    threshold: float
    num_to_transfer: int = 1

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Return `num_to_transfer` for as many steps as the block can take."""
        return _as_long_as_it_takes(num_open, self.num_to_transfer)

    def count(self, confidence: Tensor, quota: Tensor) -> Tensor:
        """Return the number of sure predictions, at least `quota`."""
        return (confidence > self.threshold).sum(-1).maximum(quota)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Factor(Reveal):
    """The r-th surest if its confidence is at least 1 - factor / (r + 1), and always the surest (Fast-dLLM)."""

    factor: float

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Return 1 for as many steps as the block can take."""
        return _as_long_as_it_takes(num_open, 1)

    def count(self, confidence: Tensor, quota: Tensor) -> Tensor:
        """Return how many pass: the bound rises with r while the confidence falls, so these come first."""
        rank = torch.arange(1, confidence.shape[-1] + 1, device=confidence.device, dtype=confidence.dtype)
        return (confidence >= 1 - self.factor / (rank + 1)).sum(-1).maximum(quota)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyBounded(Reveal):
    """The surest whose entropies add up to less than `bound`, and always the surest (SDAR's `entropy_bounded`).

    Confidences must be negative entropies in nats. The rule is that of SDAR's own code, with the entropy taken over the
    vocabulary. The paper that it goes back to (arXiv 2505.24857) leaves the largest entropy out of the sum.
    """

    bound: float

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Return 1 for as many steps as the block can take."""
        return _as_long_as_it_takes(num_open, 1)

    def count(self, confidence: Tensor, quota: Tensor) -> Tensor:
        """Return how many of the surest stay within the bound, at least `quota`."""
        return (confidence.neg().cumsum(-1) < self.bound).sum(-1).maximum(quota)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ByRow(Reveal):
    """One rule with quotas of each row's own: rows whose blocks differ share a batch."""

    rows: Sequence[Reveal]
    """One per row, which differ in block size and steps only."""

    def quotas(self, num_open: Tensor, generator: Randomness | None) -> Tensor:
        """Return each row's quotas; who has fewer steps commits nothing in the others."""
        found: dict[int, Tensor] = {}
        for reveal in dict.fromkeys(self.rows):
            alike = [row for row, other in enumerate(self.rows) if other == reveal]
            own = generator
            if generator is not None and not isinstance(generator, torch.Generator):
                own = [generator[row] for row in alike]
            found |= zip(alike, reveal.quotas(num_open[alike], own), strict=True)
        return torch.nn.utils.rnn.pad_sequence([found[row] for row in range(len(self.rows))], batch_first=True)

    @property
    def is_fixed(self) -> bool:
        """Whether the quotas alone say how many are committed."""
        return self.rows[0].is_fixed

    def count(self, confidence: Tensor, quota: Tensor) -> Tensor:
        """Return what the rule says, which no row's own values enter."""
        return self.rows[0].count(confidence, quota)


def _shares(block_size: int, steps: int, rows: int) -> Tensor:
    steps = min(steps, block_size)
    share = block_size // steps + (torch.arange(steps) < block_size % steps).long()
    return share.expand(rows, -1)


def _as_long_as_it_takes(num_open: Tensor, per_step: int) -> Tensor:
    most = int(num_open.max()) if num_open.numel() else 0
    return torch.full((num_open.shape[0], -(-most // per_step)), per_step)


def reveal_counts(
    num_masked: Tensor,
    steps: int,
    *,
    schedule: Schedule,
    generator: Randomness | None = None,
) -> Tensor:
    """Spread each row's masked tokens over `steps`: [B] -> [B, S'], S' <= steps, int64 on the CPU.

    At step j a token stays masked with probability `schedule.stay_masked((S-j-1)/S, (S-j)/S)`, S being `steps`. The
    expected number of the others, rounded half to even, is revealed. With a `generator`, or one per row, the number is
    a binomial draw instead. Steps that would reveal nothing are dropped. That is exact, because the network is not told
    the time. Every row's total equals its number of masked tokens.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}.")
    left = num_masked.to("cpu", torch.float64)
    columns = []
    for step in range(steps):
        reveal = 1 - schedule.stay_masked((steps - step - 1) / steps, (steps - step) / steps)
        count = (left * reveal).round() if generator is None else _binomial(left, reveal, generator)
        count = count.minimum(left)
        left = left - count
        columns.append(count)
    return _without_empty(torch.stack(columns, dim=1).long())


def dream_counts(num_masked: Tensor, steps: int, *, eps: float, generator: Randomness | None = None) -> Tensor:
    """Spread each row's masked tokens as Dream's `diffusion_generate` does: [B] -> [B, `steps`], int64 on the CPU.

    At step i, times falling evenly from 1 to `eps`, a token is revealed with probability 1 - t_{i+1} / t_i; the last
    step reveals all that are left. The expected number is rounded down, in float32 as published. With a `generator`, or
    one per row, the number is a binomial draw instead. A count may be 0, and the last one is often the largest. Every
    row counts for itself; the published code takes the mean over the batch, which leaves masks in some rows and masks
    committed tokens of others again.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}.")
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32)
    shares = 1 - times[1:] / times[:-1]
    left = num_masked.to("cpu", torch.int64)
    columns = []
    for share in shares[:-1]:
        if generator is None:
            count = (left.float() * share).long()
        else:
            count = _binomial(left.double(), float(share), generator).long()
        columns.append(count)
        left = left - count
    return torch.stack([*columns, left], dim=1)


def _without_empty(counts: Tensor) -> Tensor:
    """Move the zeros of each row behind its other counts, and cut the columns that are zero in every row."""
    order = (counts == 0).to(torch.int8).argsort(dim=1, stable=True)
    counts = counts.gather(1, order)
    width = int((counts > 0).sum(1).max()) if counts.numel() else 0
    return counts[:, :width]


def _binomial(total: Tensor, probability: float, generator: Randomness) -> Tensor:
    if isinstance(generator, torch.Generator):
        return torch.binomial(total, torch.full_like(total, probability), generator=on_the_host(generator))
    each = torch.full((1,), probability, dtype=total.dtype)
    return torch.cat(
        [torch.binomial(one[None], each, generator=on_the_host(own)) for one, own in zip(total, generator, strict=True)]
    )
