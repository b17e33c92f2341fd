"""The masked loss: cross-entropy at the masked positions only, weighted, summed per row, and normalised.

Each formula stands here once; training, memory, likelihood and evaluation all call it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm.diffusion.masking import BlockTimes, Corrupted, positions_of
from memdlm.diffusion.schedules import Schedule
from memdlm.errors import ConfigError, unknown
from memdlm.types import (
    Counts,
    Denoise,
    Elementwise,
    Ids,
    Logits,
    OfParts,
    OfTexts,
    PartTimes,
    Positions,
    PositionSet,
    TokenIds,
    TokenLoss,
    Values,
)

Weighting = Callable[[Schedule, Elementwise], Tensor]


def _scheduler_weight(schedule: Schedule, t: Elementwise) -> Tensor:
    return schedule.loss_weight(t)


def _uniform_weight(schedule: Schedule, t: Elementwise) -> Tensor:
    return torch.ones_like(t)


def _inverse_weight(schedule: Schedule, t: Elementwise) -> Tensor:
    # At time 0 nothing is masked. An infinite weight would make NaN of the sum over nothing.
    probability = 1 - schedule.alpha(t)
    return torch.where(probability > 0, 1 / probability, 0)


WEIGHTINGS: dict[str, Weighting] = {
    "scheduler": _scheduler_weight,
    "uniform": _uniform_weight,
    "inverse": _inverse_weight,
}
"""w(t): `scheduler` makes the loss a bound on the likelihood, `uniform` is 1, `inverse` is one over the probability of
a mask (SDAR; with the linear schedule this is `scheduler` without its 1e-6)."""

NORMS = ("token", "sequence", "batch")
"""What a loss is divided by: all counted tokens; each row's counted tokens, then the rows; the rows."""


def weight_of(name: str, schedule: Schedule, t: Elementwise) -> Tensor:
    """Return w(t), of the shape of `t`, for the weighting called `name`; raises ConfigError with the possible names."""
    if name not in WEIGHTINGS:
        raise ConfigError(unknown("loss_weight_type:", name, WEIGHTINGS))
    return WEIGHTINGS[name](schedule, t)


def cross_entropy(logits: Logits, targets: TokenIds) -> Values:
    """Return [N] nats, in float32 or wider, whatever the dtype of `logits` [N, V]."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none")


@final
class Nats(TokenLoss):
    """The cross-entropy to `targets` [N]."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def values(self, logits: Logits, chosen: slice) -> Tensor:
        """Return [n] nats."""
        return cross_entropy(logits, self.targets[chosen])

    @torch.no_grad()
    def consume(self, logits: Logits, chosen: slice) -> tuple[Tensor, Tensor]:
        """Return the nats, and softmax(logits) minus one at the target."""
        wide = logits.detach()
        if wide.dtype in (torch.bfloat16, torch.float16):
            wide = wide.float()
        targets = self.targets[chosen, None]
        # One exponential and one pass fewer than log-softmax and its derivative.
        wide.sub_(wide.amax(-1, keepdim=True))
        at_target = wide.gather(-1, targets)
        total = wide.exp_().sum(-1, keepdim=True)
        nats = (total.log() - at_target).squeeze(-1)
        wide.div_(total).scatter_add_(-1, targets, wide.new_full((1, 1), -1.0).expand_as(targets))
        return nats, wide.to(logits.dtype)


def row_sums(values: Values, positions: Positions, shape: torch.Size) -> OfTexts:
    """Sum `values` [N] at `positions` of a [B, L] tensor over each row: [B]; bitwise the same in every run."""
    dense = values.new_zeros(shape.numel()).scatter(0, positions, values)
    return dense.view(shape).sum(-1)


def part_sums(values: Values, positions: Positions, shape: torch.Size, times: BlockTimes) -> OfParts:
    """Sum `values` [N] at `positions` of a [B, L] tensor over each part of a row that `times` has: [B, P]."""
    dense = values.new_zeros(shape.numel()).scatter(0, positions, values)
    return _by_part(dense.view(shape), times)


def _by_part(dense: Tensor, times: BlockTimes) -> Tensor:
    """Sum [B, L] over the columns of each part: [B, P]."""
    parts = times.t.shape[1]
    return F.pad(dense, (0, parts * times.block - dense.shape[1])).unflatten(1, (parts, times.block)).sum(-1)


def normalise(
    sums: OfTexts,
    counts: Counts,
    norm: str,
    *,
    samples: int = 1,
    total_tokens: Tensor | float | None = None,
    total_rows: Tensor | float | None = None,
) -> Tensor:
    """Turn per-row sums [B] into one loss per sample [S]; sample s owns rows s*B/S .. (s+1)*B/S - 1.

    With c the `counts` [B], the norm token is sum(sums) / sum(c), sequence is mean(sums / c), batch is mean(sums).
    Under gradient accumulation or with several ranks, pass `total_tokens` and `total_rows` of the whole optimizer
    step: the parts of a batch then add up to exactly what the whole batch gives. Rows or samples without counted
    tokens contribute 0. Raises ConfigError for an unknown norm.
    """
    sums, counts = sums.view(samples, -1), counts.view(samples, -1).to(sums.dtype)
    rows = sums.shape[1] if total_rows is None else total_rows
    if norm == "token":
        tokens = counts.sum(1).clamp_min(1) if total_tokens is None else total_tokens
        return sums.sum(1) / tokens
    if norm == "sequence":
        return (sums / counts.clamp_min(1)).sum(1) / rows
    if norm == "batch":
        return sums.sum(1) / rows
    raise ConfigError(unknown("loss_norm_type:", norm, NORMS))


def shares(
    counts: Tensor, norm: str, *, total_tokens: Tensor | float | None = None, total_rows: Tensor | float | None = None
) -> Tensor:
    """Return [B] float64, the factors of `normalise` for the rows' sums: one sample's loss is (sums * shares).sum()."""
    wide = counts.double()
    if norm == "token":
        # Ones of float64 first: one over a tensor of integers would be float32.
        return torch.ones_like(wide) / (wide.sum().clamp_min(1) if total_tokens is None else total_tokens)
    rows = len(counts) if total_rows is None else total_rows
    if norm == "sequence":
        return 1 / (wide.clamp_min(1) * rows)
    if norm == "batch":
        return torch.ones_like(wide) / rows
    raise ConfigError(unknown("loss_norm_type:", norm, NORMS))


@dataclass(frozen=True, slots=True)
class PartBounds:
    """A bound by the parts of its rows that share a time: the blocks of block diffusion, or each row as one part."""

    bound: OfParts
    """[B, P] nats."""
    counts: OfParts
    """[B, P] maskable positions."""
    t: PartTimes


@dataclass(frozen=True, slots=True)
class MaskedLoss:
    """The loss of one denoising pass."""

    sums: OfTexts
    """[B] weighted nats, summed over the masked positions of each row; carries the gradient."""
    bound: Tensor
    """[B] the same with the schedule's weight, without gradient: an estimate of each row's NELBO, in nats."""
    counts: Counts
    """[B] int64, the number of maskable positions of each row."""
    parts: PartBounds
    """The bound by time."""
    loss: Tensor | None = None
    """[] the normalised sums, if a `norm` was given. It then carries the gradient, and the sums do not."""


@dataclass(frozen=True, slots=True)
class Planner:
    """Planner-aware path learning (PAPL, arXiv 2509.23405, Eq. 7): the loss counts more where decoding would go next.

    A masked token's cross-entropy is multiplied by 1 + weight * share. The shares of a row are the softmax of its
    masked tokens' log-probabilities, divided by `temperature`. They add up to 1 and carry no gradient. The paper calls
    the weight alpha and the temperature tau.
    """

    weight: float
    temperature: float = 1.0

    def factors(self, nats: Values, positions: Positions, shape: torch.Size) -> Values:
        """Return [N] factors for the cross-entropies `nats` [N] at `positions` of a [B, L] tensor."""
        sure = -nats.detach() / self.temperature
        dense = sure.new_full((shape.numel(),), float("-inf")).scatter(0, positions, sure)
        return 1 + self.weight * dense.view(shape).softmax(-1).flatten()[positions]


def masked_loss(
    denoise: Denoise,
    clean: Ids,
    noised: Corrupted,
    is_maskable: PositionSet,
    *,
    schedule: Schedule,
    weighting: str = "scheduler",
    planner: Planner | None = None,
    norm: str | None = None,
    total_tokens: Tensor | float | None = None,
    total_rows: Tensor | float | None = None,
) -> MaskedLoss:
    """Predict the masked tokens of `noised` and sum w(t) * cross-entropy over each row (the MDLM loss).

    Where each block of `noised` has its own time, each has its own weight (BD3-LM, arXiv 2503.09573). A `planner` gives
    tokens that decoding would commit first more weight in the sums; the bound stays the same. With `norm` the result
    has a `loss`, normalised as by `normalise`. Every token's weight is then known beforehand (unless there is a
    planner). So our families hold at most a chunk of logits at a time, and compute each chunk once.
    """
    positions, counts, times = positions_of(noised.is_masked), is_maskable.sum(-1), noised.parts()
    per_token, weight = Nats(clean.flatten()[positions]), weight_of(weighting, schedule, times.t)
    of_rows = None if norm is None else shares(counts, norm, total_tokens=total_tokens, total_rows=total_rows)
    loss = None
    if of_rows is not None and planner is None:
        row, column = positions // clean.shape[1], positions % clean.shape[1]
        of_tokens = (of_rows[:, None] * weight)[row, column // times.block]
        loss, nats = denoise.read_sum(noised.ids, positions, per_token, of_tokens)
    else:
        nats = denoise.read(noised.ids, positions, per_token)
    per_part = part_sums(nats, positions, clean.shape, times)
    bound = per_part.detach() * schedule.loss_weight(times.t)
    parts = PartBounds(bound, _by_part(is_maskable, times), times.t)
    if planner is not None:
        per_part = part_sums(nats * planner.factors(nats, positions, clean.shape), positions, clean.shape, times)
    sums = (per_part * weight).sum(1)
    if of_rows is not None and loss is None:
        loss, sums = (sums * of_rows.to(sums.dtype)).sum(), sums.detach()
    return MaskedLoss(sums, bound.sum(1), counts, parts, loss)
