"""Monte-Carlo bound on the likelihood of a continuation, with stratified mask counts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memdlm.diffusion.losses import Nats, row_sums
from memdlm.diffusion.masking import positions_of
from memdlm.errors import ConfigError, DataError, NotFiniteError
from memdlm.finite import are_logits
from memdlm.randomness import uniform
from memdlm.types import Denoise, Ids, PositionSet


class Likelihood(float):
    """An upper bound on -log p(target | prompt), in nats summed over the target's tokens: a float with an error."""

    stderr: float
    """Standard error over the independent rounds, in nats; NaN with a single round."""
    num_samples: int
    """Noised copies that were scored."""

    def __new__(cls, nll: float, *, stderr: float, num_samples: int) -> "Likelihood":
        """Attach the error to the value."""
        value = super().__new__(cls, nll)
        value.stderr, value.num_samples = stderr, num_samples
        return value


def monte_carlo_nll(
    denoise: Denoise,
    prompt_ids: Tensor,
    target_ids: Tensor,
    *,
    mask_token_id: int,
    num_samples: int = 128,
    batch_size: int = 16,
    generator: torch.Generator,
) -> Likelihood:
    """Estimate the bound for `target_ids` [T] after `prompt_ids` [P].

    Each round masks x of the T target tokens in each of `batch_size` copies, with the x evenly spread over 1..T
    from a random start, and sums cross-entropy * T / x over the masked positions: an unbiased estimate of the
    any-order bound. The start is a real number, so that every x is as likely as any other in every copy. (The published
    code starts from a whole number and rounds half to even; where T / `batch_size` is half of an odd number, odd x then
    come up a third as often as even ones.)

    Raises ConfigError unless `num_samples` is a multiple of `batch_size`, DataError for an empty target, NotFiniteError
    when the network computes NaN or infinity.
    """
    if num_samples < 1 or num_samples % batch_size:
        raise ConfigError(f"num_samples must be a multiple of batch_size, got {num_samples} and {batch_size}.")
    if target_ids.numel() == 0:
        raise DataError("target_ids is empty: the likelihood of no tokens is not defined.")
    clean = torch.cat((prompt_ids, target_ids))[None].expand(batch_size, -1)
    rounds = []
    for _ in range(num_samples // batch_size):
        is_masked, share = _stratified(prompt_ids.numel(), target_ids.numel(), batch_size, generator, clean.device)
        rounds.append(weighted_nll(denoise, clean, is_masked, share, mask_token_id=mask_token_id).mean())
    values = torch.stack(rounds).double()
    error = values.std().item() / len(rounds) ** 0.5 if len(rounds) > 1 else math.nan
    return Likelihood(finite(values.mean().item(), "the likelihood"), stderr=error, num_samples=num_samples)


@torch.no_grad()
def monte_carlo_rows(
    denoise: Denoise,
    clean: Ids,
    spans: Sequence[tuple[int, int]],
    *,
    mask_token_id: int,
    num_samples: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Return [B] bounds in nats, one per row of `clean` [B, L]: those of `monte_carlo_nll` with one round, in one pass.

    `spans` has the lengths (prompt, target) of every row; what follows in the row is padding, which `denoise` hides.
    The network gets B * num_samples rows. Raises NotFiniteError when it computes NaN or infinity.
    """
    # Every row has draws of its own, so its bound does not depend on its neighbours.
    drawn = [
        _stratified(*span, num_samples, generator, clean.device)
        for span, generator in zip(spans, generators, strict=True)
    ]
    width = clean.shape[1]
    is_masked = torch.cat([torch.nn.functional.pad(each, (0, width - each.shape[1])) for each, _ in drawn])
    share = torch.cat([each for _, each in drawn])
    copies = clean.repeat_interleave(num_samples, 0)
    nats = weighted_nll(denoise, copies, is_masked, share, mask_token_id=mask_token_id)
    values = nats.view(len(spans), num_samples).mean(1)
    if not bool(values.isfinite().all()):
        raise NotFiniteError("a likelihood is not finite: the model's logits hold NaN or infinity.")
    return values


def finite(value: float, what: str) -> float:
    """Return `value`; raises NotFiniteError, which calls it `what`, when it is NaN or infinite."""
    if not math.isfinite(value):
        raise NotFiniteError(f"{what} is {value}: the model's logits hold NaN or infinity.")
    return value


def weighted_nll(denoise: Denoise, clean: Ids, is_masked: PositionSet, share: Tensor, *, mask_token_id: int) -> Tensor:
    """Return [B]: cross-entropy at the masked positions, summed per row, divided by the `share` [B] masked."""
    positions = positions_of(is_masked)
    nats = denoise.read(clean.masked_fill(is_masked, mask_token_id), positions, Nats(clean.flatten()[positions]))
    return row_sums(nats, positions, clean.shape) / share


def is_greedy(denoise: Denoise, prompt_ids: Tensor, target_ids: Tensor, *, mask_token_id: int) -> bool:
    """Whether decoding one token per step, most confident first, reproduces `target_ids` [T]; takes T passes.

    Raises NotFiniteError when the network computes NaN or infinity.
    """
    ids = torch.cat((prompt_ids, torch.full_like(target_ids, mask_token_id)))[None]
    is_open = torch.zeros_like(ids, dtype=torch.bool)
    is_open[:, prompt_ids.numel() :] = True
    are_finite = torch.ones((), dtype=torch.bool, device=ids.device)
    for _ in range(target_ids.numel()):
        positions = positions_of(is_open)
        logits = denoise.logits(ids, positions)
        are_finite = are_finite & are_logits(logits)
        probability = logits.float().softmax(-1)
        probability[:, mask_token_id] = 0
        confidence, token = probability.max(-1)
        surest = confidence.argmax()[None]
        best = positions[surest]
        ids = ids.flatten().scatter(0, best, token[surest]).view_as(ids)
        is_open = is_open.flatten().index_fill(0, best, False).view_as(is_open)
    is_same, are_finite = torch.stack(((ids[0, prompt_ids.numel() :] == target_ids).all(), are_finite)).tolist()
    if not are_finite:
        raise NotFiniteError("the model's logits hold NaN or infinity, from which no token can be chosen.")
    return bool(is_same)


def _stratified(
    prompt: int, target: int, batch: int, generator: torch.Generator, device: torch.device
) -> tuple[PositionSet, Tensor]:
    start = uniform((1,), generator, device, torch.float64)
    # In units of the target's length: the last one before 1 must not become 1 by rounding.
    place = (start + torch.arange(batch, device=device, dtype=torch.float64) / batch) % 1
    count = (place * target).long().clamp(max=target - 1) + 1
    order = uniform((batch, target), generator, device).argsort(-1).argsort(-1)
    is_masked = torch.zeros(batch, prompt + target, dtype=torch.bool, device=device)
    is_masked[:, prompt:] = order < count[:, None]
    return is_masked, count.float() / target
