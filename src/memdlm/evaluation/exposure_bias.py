"""Exposure bias: how much worse a model predicts from its own tokens than from the true ones, step by step.

At step s of decoding, with the positions M_s still masked:

    sequential(s)  loss at M_s, given the model's own predictions of the other response tokens
    static(s)      loss at as many random positions, given the true other tokens
    matched(s)     loss at the same M_s, given the true other tokens

The paper's ratio is sequential / static. Confidence decoding leaves the hardest positions for last, while the static
condition masks random positions. That ratio therefore grows even without errors to propagate. The ratio
sequential / matched compares the same positions, and shows what the model's own errors cost.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memdlm.diffusion.likelihood import finite
from memdlm.diffusion.losses import cross_entropy
from memdlm.diffusion.masking import positions_of
from memdlm.diffusion.sampling import TokenSampler, denoise_canvas
from memdlm.errors import DataError
from memdlm.evaluation.prompts import PaddedBatch
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.networks.soundness import blaming
from memdlm.randomness import Randomness, derive, uniform
from memdlm.types import Denoise, Ids, PositionSet


@dataclass(frozen=True, kw_only=True, slots=True)
class ExposureBias:
    """Losses per decoding step, in nats per masked token, averaged over all masked tokens of all rows."""

    step: list[int]
    """Number of steps done before the measurement; 0 is the fully masked response."""
    static: list[float]
    sequential: list[float]
    matched: list[float]


def exposure_bias(
    model: nn.Module,
    batches: Sequence[PaddedBatch],
    *,
    mask_token_id: int,
    steps: int,
    seed: int,
    memory: ParametricMemory | None = None,
) -> ExposureBias:
    """Measure the three losses while the targets of `batches` are decoded in `steps` steps (most confident first).

    With a `memory`, each prompt is written first. Every row draws from a generator of its own: equal seeds give every
    model the same random positions, whatever the batches. Raises DataError when there is nothing to decode,
    NotFiniteError when the model computes NaN or infinity.
    """
    totals: dict[int, Tensor] = {}
    start = 0
    for batch in batches:
        rows = range(start, start + batch.ids.shape[0])
        start = rows.stop
        drawn = [derive("exposure bias write", seed, row) for row in rows]
        with nullcontext() if memory is None else memory.write(*batch.prompt(), drawn), blaming(model):
            randomness = [derive("exposure bias", seed, row) for row in rows]
            for step, sums in _measure(model, batch, mask_token_id, steps, randomness):
                totals[step] = totals[step] + sums if step in totals else sums
    if not totals:
        raise DataError("exposure bias: the batches have no target tokens to decode.")
    means = [(totals[step][:3] / totals[step][3]).tolist() for step in sorted(totals)]
    with blaming(model):
        finite(sum(sum(mean) for mean in means), "the loss")
    return ExposureBias(
        step=sorted(totals),
        static=[mean[0] for mean in means],
        sequential=[mean[1] for mean in means],
        matched=[mean[2] for mean in means],
    )


@torch.no_grad()
def _measure(
    model: nn.Module, batch: PaddedBatch, mask_token_id: int, steps: int, randomness: Randomness
) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, [static, sequential, matched, number of masked tokens]) sums over the batch."""
    denoise = ModelDenoiser(model, attention_mask=batch.attention_mask)
    is_target = batch.is_target
    start = batch.ids.masked_fill(is_target, mask_token_id)
    canvases = [start]
    canvases += [
        step.ids
        for step in denoise_canvas(
            denoise,
            start,
            is_target,
            [is_target],
            steps_per_block=steps,
            sampler=TokenSampler(mask_token_id=mask_token_id),
        )
    ]
    for step, canvas in enumerate(canvases[:-1]):
        is_open = is_target & (canvas == mask_token_id)
        key = uniform(is_open.shape, randomness, is_open.device).masked_fill(~is_target, 2.0)
        is_random = key.argsort(-1).argsort(-1) < is_open.sum(-1)[:, None]
        sums = [
            _sum(denoise, batch.ids.masked_fill(is_random, mask_token_id), is_random, batch.ids),
            _sum(denoise, canvas, is_open, batch.ids),
            _sum(denoise, batch.ids.masked_fill(is_open, mask_token_id), is_open, batch.ids),
        ]
        yield step, torch.stack([*sums, is_open.sum().double()])


def _sum(denoise: Denoise, ids: Ids, is_scored: PositionSet, clean: Ids) -> Tensor:
    positions = positions_of(is_scored)
    return cross_entropy(denoise.logits(ids, positions), clean.flatten()[positions]).double().sum()
