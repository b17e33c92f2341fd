"""The reverse process: one loop that fills the open positions of a canvas, block by block, step by step.

The loop owns the control flow. What varies is a small object: which token and how sure (`Commit`), or data: the
blocks, the number of tokens per step. A step sees the whole canvas but predicts only the open positions of its
block; the mask token is never predicted, so nothing is left open.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from memdlm.diffusion.masking import positions_of
from memdlm.diffusion.reveal import reveal_counts
from memdlm.diffusion.schedules import Linear, Schedule
from memdlm.errors import ConfigError, unknown
from memdlm.types import Denoise, Ids, Logits, PositionSet


class Commit(ABC):
    """How sure a prediction is; the surest are committed first."""

    @abstractmethod
    def confidence(self, logits: Logits, token: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return [N] confidences of `token` [N] under `logits` [N, V]."""


@final
@dataclass(frozen=True, slots=True)
class LowConfidence(Commit):
    """The probability of the predicted token, in float32 so that bf16 ties cannot decide: the unsure stay masked."""

    def confidence(self, logits: Logits, token: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return softmax(logits) at `token`."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.gather(-1, token[:, None]).squeeze(1).sub(wide.logsumexp(-1)).exp()


@final
@dataclass(frozen=True, slots=True)
class RandomOrder(Commit):
    """Uniform noise: tokens are committed in random order."""

    def confidence(self, logits: Logits, token: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return U[0, 1) draws."""
        if generator is None:
            raise ConfigError("remasking 'random' draws the order: pass a generator.")
        return torch.rand(token.shape, generator=generator, device=generator.device).to(token.device)


COMMITS: dict[str, type[Commit]] = {"low_confidence": LowConfidence, "random": RandomOrder}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a step turns logits into committed tokens."""

    mask_token_id: int
    commit: Commit = field(default_factory=LowConfidence)
    temperature: float = 0.0
    """0: the most likely token; otherwise a sample from softmax(logits / temperature)."""
    suppress: tuple[int, ...] = ()
    """Tokens that are never predicted."""
    postpone: tuple[int, ...] = ()
    """Tokens whose confidence counts as 0: they are committed only when nothing else is left."""

    def choose(self, logits: Logits, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return (token [N], confidence [N]) for `logits` [N, V]."""
        if self.suppress:
            logits = logits.index_fill(-1, self._ids(self.suppress, logits), float("-inf"))
        allowed = logits.index_fill(-1, self._ids((self.mask_token_id,), logits), float("-inf"))
        token = _gumbel(allowed, self.temperature, generator).argmax(-1)
        if self.postpone:
            logits = logits.index_fill(-1, self._ids(self.postpone, logits), float("-inf"))
        return token, self.commit.confidence(logits, token, generator)

    @staticmethod
    def _ids(ids: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.tensor(ids, device=like.device)


def make_commit(name: str) -> Commit:
    """Return the commit rule called `name` (`remasking`); raises ConfigError with the possible names."""
    if name not in COMMITS:
        raise ConfigError(unknown("remasking:", name, COMMITS))
    return COMMITS[name]()


@dataclass(frozen=True, slots=True)
class Step:
    """One committed denoising step."""

    ids: Ids
    """[B, T] the canvas after the step."""
    is_new: PositionSet
    """[B, T] true where the step committed a token."""
    num_scored: int
    """Positions that reached the vocabulary projection."""


def denoise_canvas(
    denoise: Denoise,
    ids: Ids,
    is_open: PositionSet,
    blocks: Sequence[PositionSet],
    *,
    steps_per_block: int,
    rule: Rule,
    schedule: Schedule | None = None,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Fill the open positions of `ids` [B, T], one block after the other, and yield after every step.

    `blocks` are position sets; a block's open tokens are spread over at most `steps_per_block` steps by
    `reveal_counts` (drawn, if `stochastic`). Rows may differ in everything: prompt length, block, open tokens.
    Runs without gradient.
    """
    if stochastic and generator is None:
        raise ConfigError("stochastic_transfer draws how many tokens a step commits: pass a generator.")
    schedule = Linear() if schedule is None else schedule
    for block in blocks:
        in_block = is_open & block
        counts = reveal_counts(
            in_block.sum(-1), steps_per_block, schedule=schedule, generator=generator if stochastic else None
        )
        for count, most in zip(counts.unbind(1), counts.amax(0).tolist() if counts.numel() else (), strict=True):
            ids, is_new, scored = _step(denoise, ids, in_block, count.to(ids.device), most, rule, generator)
            in_block, is_open = in_block & ~is_new, is_open & ~is_new
            yield Step(ids, is_new, scored)


@torch.no_grad()
def _step(
    denoise: Denoise,
    ids: Ids,
    in_block: PositionSet,
    count: Tensor,
    most: int,
    rule: Rule,
    generator: torch.Generator | None,
) -> tuple[Ids, PositionSet, int]:
    """Commit the `count` [B] (at most `most`) surest predictions of each row among the open positions [B, T]."""
    positions = positions_of(in_block & (count > 0)[:, None])
    token, confidence = rule.choose(denoise.logits(ids, positions), generator)
    sure = confidence.new_full(ids.shape, float("-inf")).flatten().scatter(0, positions, confidence).view_as(ids)
    # Exact ties fall as torch.topk lets them, as in the published code (postponed tokens all tie, at 0).
    surest = sure.topk(most, dim=-1).indices
    wanted = torch.arange(most, device=ids.device) < count[:, None]
    is_new = torch.zeros_like(in_block).scatter(1, surest, wanted) & in_block
    predicted = ids.flatten().scatter(0, positions, token).view_as(ids)
    return torch.where(is_new, predicted, ids), is_new, positions.numel()


def _gumbel(logits: Logits, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits
    if generator is None:
        raise ConfigError(f"temperature {temperature} draws tokens: pass a generator.")
    uniform = torch.rand(logits.shape, generator=generator, device=generator.device, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.to(logits.device)))
    return logits.double() / temperature + noise


def blocks_after_prompt(prompt_lengths: Tensor, length: int, max_new_tokens: int, block_size: int) -> list[PositionSet]:
    """Cut each row's response into blocks that start at its own prompt end: a list of [B, length] sets."""
    column = torch.arange(length, device=prompt_lengths.device)[None]
    offset = column - prompt_lengths[:, None]
    inside = (offset >= 0) & (offset < max_new_tokens)
    starts = range(0, max_new_tokens, block_size)
    return [inside & (offset >= start) & (offset < start + block_size) for start in starts]


def absolute_blocks(batch: int, length: int, block_size: int, device: torch.device) -> list[PositionSet]:
    """Cut the columns into blocks that start at column 0: a list of [B, length] sets."""
    column = torch.arange(length, device=device)[None].expand(batch, -1)
    return [(column >= start) & (column < start + block_size) for start in range(0, length, block_size)]
