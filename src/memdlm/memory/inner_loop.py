"""The inner loop: follow a trajectory, take one gradient step on the fast weights at each state (MemDLM Eq. 6).

Nothing here waits for the device, except to learn how many positions the states score if nobody knows.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
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
from memdlm.types import Counts, Denoise, Ids, OfSamples, Positions, Times, Values

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
        counts: Counts | None = None,
    ) -> LossOf:
        """Fix what `step` follows, under the fast weights of now; what is left to say is which network reads it."""
        target = self.objective.target(denoise, step, positions)

        def losses_of(read: Denoise, gates: Tensor | None = None) -> Tensor:
            values = self.objective.values(read, step, positions, target)
            return self.reduce(values if gates is None else values * gates, positions, step, samples, whole, counts)

        return losses_of

    def reduce(
        self,
        values: Values,
        positions: Positions,
        step: TrajectoryStep,
        samples: int,
        whole: "JoinedBatch | None" = None,
        counts: Counts | None = None,
    ) -> OfSamples:
        """Weight and normalise `values` [N] at `positions`: one loss per sample [S], or this rank's part of `whole`.

        Sampled positions stand for all that are scored: their sum is scaled up, so its mean over the draws is the sum
        over all. `counts` are the scored positions of each row's whole text, where `step` is one chunk of it; the
        chunks' losses then add up to the text's.
        """
        sums = row_sums(values, positions, step.ids.shape) * weight_of(self.weighting, self.schedule, step.t)
        if step.is_sampled is not None:
            sums = sums * (step.is_scored.sum(-1).to(sums.dtype) / step.is_sampled.sum(-1).clamp_min(1))
        totals = {} if whole is None else {"total_tokens": whole.tokens.clamp_min(1), "total_rows": whole.rows}
        counts = step.is_scored.sum(-1) if counts is None else counts
        return normalise(sums, counts, self.norm, samples=samples, **totals)


@dataclass(frozen=True, slots=True)
class JoinedBatch:
    """What the batch of all ranks is divided by at one state."""

    tokens: Tensor
    """[] scored positions."""
    rows: Tensor
    """[] texts, each as often as it has views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A text, or a part of one, as the updates read it."""

    steps: Sequence[TrajectoryStep]
    """What each update follows; more updates than steps begin again."""
    denoise: Denoise
    gate: Gate | None = None
    """Weighs the scored positions."""
    outer: OuterGradient = field(default_factory=Untracked)
    counts: Sequence[int] | None = None
    """How many positions each step reads; None: the device is waited for, once, to learn them."""
    forget: Callable[[], None] = lambda: None
    """Lets go of what was computed for the chunk. It is called after each update that several chunks share."""

    def sizes(self) -> Sequence[int]:
        """Return `counts`, or wait for the device."""
        if self.counts is not None:
            return self.counts
        found: list[int] = torch.stack([step.is_read.sum() for step in self.steps]).tolist()
        return found


@dataclass(frozen=True, slots=True)
class _State:
    """One state of a chunk, and what its loss is divided by."""

    chunk: Chunk
    step: TrajectoryStep
    size: int
    whole: JoinedBatch | None
    counts: Tensor

    def gradient(
        self, fast: FastWeights, loss: InnerLoss, leaves: Sequence[Tensor], update: int
    ) -> tuple[Tensor, InnerGradient]:
        """Return the loss [S] at `leaves`, which `fast` holds, and its gradient."""
        step, chunk = self.step, self.chunk
        with torch.enable_grad():
            positions = positions_of(step.is_read, self.size)
            gates = None if chunk.gate is None else chunk.gate(step.ids, positions)
            losses_of = loss.at(step, positions, chunk.denoise, fast.num_samples, self.whole, self.counts)
            # The backward pass too: it may run layers again, and they must drop the same inputs.
            with fast.dropping(update):
                per_sample = losses_of(chunk.denoise, None if gates is None else gates.detach())
                found = differentiate(per_sample, leaves)
        return per_sample.detach(), InnerGradient(
            found=found, loss_of=losses_of, gates=gates, ids=step.ids, update=update
        )


def _states(chunks: Sequence[Chunk], ranks: Ranks | None) -> list[list[_State]]:
    """Return, for every step, the states of all chunks that its update adds up."""
    sizes = [chunk.sizes() for chunk in chunks]
    # Row by row and step by step: a text's chunks have the same rows.
    counts = [
        torch.stack([step.is_scored.sum(-1) for step in of_step]).sum(0)
        for of_step in zip(*(chunk.steps for chunk in chunks), strict=True)
    ]
    wholes: list[JoinedBatch | None] = [None] * len(counts)
    if ranks is not None:
        # Of every step: one may have more views of each text than another.
        rows = torch.tensor([len(step.ids) for step in chunks[0].steps], device=counts[0].device)
        *tokens, rows = ranks.sum([*(each.sum() for each in counts), rows])
        wholes = [JoinedBatch(*each) for each in zip(tokens, rows.unbind(), strict=True)]
    times = [_times_of_text(of_step) for of_step in zip(*(chunk.steps for chunk in chunks), strict=True)]
    return [
        [
            _State(chunk, replace(chunk.steps[index], t=times[index]), size[index], whole, count)
            for chunk, size in zip(chunks, sizes, strict=True)
        ]
        for index, (whole, count) in enumerate(zip(wholes, counts, strict=True))
    ]


def _times_of_text(of_step: Sequence[TrajectoryStep]) -> Times:
    """Return the times that a step would have if its chunks were one text: the share of it that is masked.

    A short chunk has a time of its own far from the text's, and would be written more weakly or strongly than the rest.
    """
    if len(of_step) == 1:
        return of_step[0].t
    sizes = torch.stack([step.num_maskable for step in of_step])
    times = torch.stack([step.t for step in of_step])
    return ((times.double() * sizes).sum(0) / sizes.sum(0).clamp_min(1)).to(times.dtype)


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
    chunk = Chunk(steps=steps, denoise=denoise, gate=gate, outer=outer, counts=counts)
    gradients = write_chunks([chunk], fast=fast, loss=loss, update=update, epochs=epochs, ranks=ranks, rates=rates)
    while True:
        try:
            next(gradients)
        except StopIteration as end:
            found: Written = end.value
            return found


def write_chunks(
    chunks: Sequence[Chunk],
    *,
    fast: FastWeights,
    loss: InnerLoss,
    update: LocalSGD,
    epochs: int = 1,
    ranks: Ranks | None = None,
    rates: Sequence[Sequence[Tensor]] | None = None,
    on_chunk: Callable[[int], None] = lambda done: None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Generator[None, None, Written]:
    """Write all `chunks` of one text by common updates: each adds up the gradients of all chunks, clips and steps once.

    The text is written as in one piece, but for attention, which ends at the borders of a chunk. The activations of
    one chunk are held at a time. `on_chunk` is told how many chunks the last update has read. Every gradient is taken
    in a block of `around`, and the generator stops after it: what the caller does until it goes on may use the network.
    The rest is as in `run_inner_loop`.
    """
    losses, norms = [], []
    values = fast.tensors() if ranks is None else ranks.first(fast.tensors())
    states = _states(chunks, ranks)
    for index, of_step in enumerate(states * epochs):
        leaves = [value.detach().requires_grad_() for value in values]
        fast.replace(leaves)
        base: Sequence[Tensor] = values
        per_sample: Tensor | None = None
        gradients: Sequence[Tensor] = []
        for done, state in enumerate(of_step, start=1):
            with around():
                of_chunk, taken = state.gradient(fast, loss, leaves, index)
                base, found = state.chunk.outer.traced(values, taken)
            if per_sample is None:
                per_sample, gradients = of_chunk, found
            else:
                per_sample = per_sample + of_chunk
                gradients = [total + part for total, part in zip(gradients, found, strict=True)]
            if len(of_step) > 1:
                state.chunk.forget()
            if index == len(states) * epochs - 1:
                on_chunk(done)
            if done < len(of_step):
                yield
        assert per_sample is not None
        if ranks is not None:
            per_sample, *gradients = ranks.sum([per_sample, *gradients])
        norm = _global_norm([gradient.detach() for gradient in gradients])
        is_sound = per_sample.isfinite() & norm.isfinite()
        values = update.step(base, gradients, is_sound, None if rates is None else rates[index])
        losses.append(per_sample)
        norms.append(norm)
        if index < len(states) * epochs - 1:
            yield
    fast.replace(values)
    stacked = torch.stack(losses)
    return Written(
        losses=stacked,
        grad_norms=torch.stack(norms),
        num_skipped=(~(stacked.isfinite() & torch.stack(norms).isfinite())).sum(0),
        num_tokens=sum(state.size for of_step in states for state in of_step) * epochs,
    )


def _global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return [S]: the norm over all tensors of a sample (the sample is the third dimension from the end)."""
    squares = [gradient.flatten(-2).square().sum(-1) for gradient in gradients]
    return torch.stack([each.sum(0) if each.dim() == 2 else each for each in squares]).sum(0).sqrt()
