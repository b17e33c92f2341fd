"""The inner loop: follow a trajectory, take one gradient step on the fast weights at each state (MemDLM Eq. 6).

Nothing here waits for the device, except to learn how many positions the states score if nobody knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from memdlm.diffusion.losses import normalise, row_sums, weight_of
from memdlm.diffusion.masking import positions_of
from memdlm.diffusion.schedules import Schedule
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.objectives import Objective
from memdlm.memory.outer_gradient import InnerGradient, LossOf, OuterGradient, Untracked, differentiate
from memdlm.memory.ranks import Ranks
from memdlm.memory.trajectory import TrajectoryStep
from memdlm.types import Denoise, Ids, OfSamples, Positions, Values

Gate: TypeAlias = Callable[[Ids, Positions], Tensor]
"""Returns the weights [N] of a state's scored positions, with the graph that an outer loss follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a write did. K counts updates (steps x epochs)."""

    losses: Tensor
    """[K], or [K, B] with a memory per sample: the objective before each update; NaN where it was not finite."""
    grad_norms: Tensor
    """[K] or [K, B]: L2 norm of the gradient over all fast weights, before clipping."""
    num_skipped: Tensor
    """[] or [B] int64: updates that were left out because loss or gradient was not finite."""
    num_tokens: int
    """Positions that were predicted and scored, summed over the K updates."""

    def of_one(self) -> "Written":
        """Drop the sample dimension, where all rows shared one memory."""
        return Written(
            losses=self.losses[:, 0],
            grad_norms=self.grad_norms[:, 0],
            num_skipped=self.num_skipped[0],
            num_tokens=self.num_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSGD:
    """phi <- phi - lr * g, the gradient of every tensor of every sample clipped on its own (MemDLM sec. 4.4)."""

    inner_lr: float = 0.1
    inner_grad_clip: float = 1.0
    """Largest L2 norm of one tensor's gradient, or of all of a sample's together; 0: no clipping."""
    inner_clip_scope: str = "tensor"
    """What the norm is of: `tensor` or `global` (the paper's ablation of local gradient normalisation)."""

    def clip(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Scale `gradients`, each [S, rows, columns] or [E, S, rows, columns], so that no norm exceeds the largest."""
        if self.inner_grad_clip == 0:
            return gradients
        norms = [gradient.flatten(-2).norm(dim=-1) for gradient in gradients]
        if self.inner_clip_scope == "global":
            # Norms of norms, not a root of squares: its derivative at 0 is 0 instead of undefined.
            of_tensors = [norm.norm(dim=0) if norm.dim() == 2 else norm for norm in norms]
            norms = [torch.stack(of_tensors).norm(dim=0)] * len(norms)
        factors = [(self.inner_grad_clip / (norm + 1e-12)).clamp(max=1.0)[..., None, None] for norm in norms]
        return [gradient * factor for gradient, factor in zip(gradients, factors, strict=True)]

    def step(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        is_sound: Tensor,
        factors: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the updated values; samples that are not `is_sound` [S] keep theirs.

        `factors`, one per tensor, multiply the learning rate.
        """
        sound = is_sound[:, None, None]
        rates: Sequence[Tensor | float] = [self.inner_lr] * len(values)
        if factors is not None:
            rates = [self.inner_lr * factor for factor in factors]
        # Left out before the product: an unsound gradient would reach the rates' own gradient as 0 * nan.
        steps = [torch.where(sound, gradient, 0) for gradient in gradients] if factors is not None else gradients
        return [
            torch.where(sound, value - rate * gradient, value)
            for value, gradient, rate in zip(values, self.clip(steps), rates, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerLoss:
    """The objective with its weighting and normalisation over the scored positions."""

    objective: Objective
    schedule: Schedule
    weighting: str
    norm: str

    def at(
        self,
        step: TrajectoryStep,
        positions: Positions,
        denoise: Denoise,
        samples: int,
        whole: "JoinedBatch | None" = None,
    ) -> LossOf:
        """Fix what `step` follows, under the fast weights of now; what is left to say is which network reads it."""
        target = self.objective.target(denoise, step, positions)

        def losses_of(read: Denoise, gates: Tensor | None = None) -> Tensor:
            values = self.objective.values(read, step, positions, target)
            return self.reduce(values if gates is None else values * gates, positions, step, samples, whole)

        return losses_of

    def reduce(
        self,
        values: Values,
        positions: Positions,
        step: TrajectoryStep,
        samples: int,
        whole: "JoinedBatch | None" = None,
    ) -> OfSamples:
        """Weight and normalise `values` [N] at `positions`: one loss per sample [S], or this rank's part of `whole`.

        Sampled positions stand for all that are scored: their sum is scaled up, so its mean over the draws is the sum
        over all.
        """
        sums = row_sums(values, positions, step.ids.shape) * weight_of(self.weighting, self.schedule, step.t)
        if step.is_sampled is not None:
            sums = sums * (step.is_scored.sum(-1).to(sums.dtype) / step.is_sampled.sum(-1).clamp_min(1))
        totals = {} if whole is None else {"total_tokens": whole.tokens.clamp_min(1), "total_rows": whole.rows}
        return normalise(sums, step.is_scored.sum(-1), self.norm, samples=samples, **totals)


@dataclass(frozen=True, slots=True)
class JoinedBatch:
    """What the batch of all ranks is divided by at one state."""

    tokens: Tensor
    """[] scored positions."""
    rows: Tensor
    """[] texts."""


def _wholes(steps: Sequence[TrajectoryStep], ranks: Ranks | None) -> list[JoinedBatch | None]:
    if ranks is None:
        return [None] * len(steps)
    rows = torch.tensor(len(steps[0].ids), device=steps[0].ids.device)
    *tokens, rows = ranks.sum([*(step.is_scored.sum() for step in steps), rows])
    return [JoinedBatch(each, rows) for each in tokens]


def run_inner_loop(
    steps: Sequence[TrajectoryStep],
    *,
    fast: FastWeights,
    loss: InnerLoss,
    update: LocalSGD,
    denoise: Denoise,
    epochs: int = 1,
    ranks: Ranks | None = None,
    rates: Sequence[Sequence[Tensor]] | None = None,
    gate: Gate | None = None,
    outer: OuterGradient | None = None,
    counts: Sequence[int] | None = None,
) -> Written:
    """Write `steps` into `fast`, `epochs` times over; `denoise` must read `fast` (`FastWeights.attached`).

    With `ranks`, all of them write the one memory that a single process would write with the joined batch, up to
    rounding; losses and norms are then the joined batch's too. `rates` are learned factors of the learning rate, for
    every update one per tensor; `gate` weighs the scored positions. Without `outer`, the written values are constants.
    `counts` are the positions that the steps read; None: the device is waited for, once, to learn them.
    """
    outer = Untracked() if outer is None else outer
    losses, norms = [], []
    values = fast.tensors() if ranks is None else ranks.first(fast.tensors())
    if counts is None:
        counts = torch.stack([step.is_read.sum() for step in steps]).tolist()
    states = list(zip(steps, counts, _wholes(steps, ranks), strict=True))
    for index, (step, count, whole) in enumerate(states * epochs):
        leaves = [value.detach().requires_grad_() for value in values]
        fast.replace(leaves)
        with torch.enable_grad():
            positions = positions_of(step.is_read, count)
            gates = None if gate is None else gate(step.ids, positions)
            losses_of = loss.at(step, positions, denoise, fast.num_samples, whole)
            # The backward pass too: it may run layers again, and they must drop the same inputs.
            with fast.dropping(index):
                per_sample = losses_of(denoise, None if gates is None else gates.detach())
                gradients = differentiate(per_sample, leaves)
        per_sample = per_sample.detach()
        if ranks is not None:
            per_sample, *gradients = ranks.sum([per_sample, *gradients])
        norm = _global_norm(gradients)
        is_sound = per_sample.isfinite() & norm.isfinite()
        taken = InnerGradient(found=gradients, loss_of=losses_of, gates=gates, ids=step.ids, update=index)
        step_from = outer.traced(values, taken)
        values = update.step(*step_from, is_sound, None if rates is None else rates[index])
        losses.append(per_sample)
        norms.append(norm)
    fast.replace(values)
    stacked = torch.stack(losses)
    return Written(
        losses=stacked,
        grad_norms=torch.stack(norms),
        num_skipped=(~(stacked.isfinite() & torch.stack(norms).isfinite())).sum(0),
        num_tokens=sum(counts) * epochs,
    )


def _global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return [S]: the norm over all tensors of a sample (the sample is the third dimension from the end)."""
    squares = [gradient.flatten(-2).square().sum(-1) for gradient in gradients]
    return torch.stack([each.sum(0) if each.dim() == 2 else each for each in squares]).sum(0).sqrt()
