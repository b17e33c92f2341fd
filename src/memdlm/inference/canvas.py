"""Prompts -> a canvas to be filled: what is open, in which blocks, and how many tokens a step commits."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memdlm.diffusion.blocks import absolute_blocks, absolute_blocks_from, blocks_after_prompt
from memdlm.diffusion.choice import TokenSampler, make_confidence
from memdlm.diffusion.reveal import Above, AtLeast, Even, Factor, Reveal, Scheduled
from memdlm.diffusion.sampling import Edit
from memdlm.errors import ConfigError, DataError
from memdlm.inference.config import GenerationConfig
from memdlm.inference.prompts import SpecialIds, pad
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal
from memdlm.models.hub.families import decoding_pattern
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.sizes import trained_positions
from memdlm.types import Ids, PositionSet

THRESHOLD = 0.95
"""What block-causal families are decoded with by default."""
MOST_PLACES = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class Canvas:
    """A batch to be filled."""

    ids: Ids
    """[B, T], with mask tokens at the open positions."""
    lengths: Tensor
    """[B] int64 on the CPU: where each row ends; what follows is not there."""
    is_open: PositionSet
    blocks: list[PositionSet]
    block_size: int
    pattern: AttentionPattern
    prompt_lengths: Tensor
    """[B] int64 on the CPU."""
    response_ends: Tensor
    """[B] int64 on the CPU: where what was asked for ends; a whole block may reach further."""

    most_new: int
    """The tokens asked for per row; of an infilling, those of a block."""
    num_shares: int
    """Among how many blocks `steps` are shared out: as many as the response fills, wherever the prompt ends."""

    @property
    def most_asked(self) -> int:
        """The most positions of a row that a step can predict."""
        return max(int((self.is_open & block).sum(1).max()) for block in self.blocks)

    @property
    def is_there(self) -> PositionSet:
        """[B, T] true before each row's end."""
        return (
            torch.arange(self.ids.shape[1], device=self.ids.device)
            < self.lengths.to(self.ids.device, non_blocking=True)[:, None]
        )

    @property
    def is_response(self) -> PositionSet:
        """[B, T] true where the answer stands."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        first, last = (
            each.to(self.ids.device, non_blocking=True)[:, None] for each in (self.prompt_lengths, self.response_ends)
        )
        return (column >= first) & (column < last)


def pattern_for(model: nn.Module, config: GenerationConfig, asked: AttentionPattern | None) -> AttentionPattern:
    """Return who sees whom while decoding: what the caller says, else the family's way.

    Raises ConfigError when a block-causal pattern and `block_size` disagree.
    """
    if asked is None:
        return decoding_pattern(getattr(unwrap(model), "config", None), config.block_size)
    if isinstance(asked, BlockCausal) and config.block_size not in (None, asked.block):
        raise ConfigError(
            f"block_size {config.block_size} and attention_pattern {asked} disagree; tokens that are decoded together "
            "are those of one block. Leave block_size out."
        )
    return asked


def response_canvas(
    rows: Sequence[Tensor], config: GenerationConfig, special: SpecialIds, pattern: AttentionPattern, model: nn.Module
) -> Canvas:
    """Lay out prompts with room for their responses. Raises ConfigError when `max_length` leaves no room."""
    longest = max(row.numel() for row in rows)
    block_size = pattern.block if isinstance(pattern, BlockCausal) else config.block_size
    _check_room(len(rows), longest + (config.max_new_tokens or config.max_length or 0), block_size)
    new = config.max_new_tokens if config.max_new_tokens is not None else (config.max_length or 0) - longest
    if new < 1:
        raise ConfigError(f"max_length {config.max_length} leaves no room after a prompt of {longest} tokens.")
    prompts = torch.tensor([row.numel() for row in rows])
    ends = prompts + new
    block = pattern.block if isinstance(pattern, BlockCausal) else min(config.block_size or new, new)
    lengths = -(-ends // block) * block if isinstance(pattern, BlockCausal) else ends
    length = int(lengths.max())
    _warn_if_long(model, int(ends.max()))
    ids, _ = pad(rows, special.eos, length)
    column = torch.arange(length)
    is_open = (column >= prompts[:, None]) & (column < lengths[:, None])
    if isinstance(pattern, BlockCausal):
        blocks = absolute_blocks_from(prompts, length, new, block)
    else:
        blocks = blocks_after_prompt(prompts, length, new, block)
    device = next(model.parameters()).device
    return Canvas(
        ids=ids.masked_fill(is_open, special.mask).to(device, non_blocking=True),
        lengths=lengths,
        is_open=is_open.to(device, non_blocking=True),
        blocks=[each.to(device, non_blocking=True) for each in blocks],
        block_size=block,
        pattern=pattern,
        prompt_lengths=prompts,
        response_ends=ends,
        most_new=new,
        num_shares=math.ceil(new / block),
    )


def infill_canvas(
    rows: Sequence[Tensor], config: GenerationConfig, special: SpecialIds, pattern: AttentionPattern, model: nn.Module
) -> Canvas:
    """Lay out texts with mask tokens in them. Raises DataError for one without."""
    for index, row in enumerate(rows):
        if not bool((row == special.mask).any()):
            raise DataError(f"sequence {index} has no mask token: there is nothing to fill.")
    device = next(model.parameters()).device
    ids, lengths = pad(rows, special.eos)
    _check_room(len(rows), ids.shape[1], pattern.block if isinstance(pattern, BlockCausal) else config.block_size)
    _warn_if_long(model, ids.shape[1])
    ids = ids.to(device, non_blocking=True)
    block = pattern.block if isinstance(pattern, BlockCausal) else config.block_size or ids.shape[1]
    blocks = absolute_blocks(ids.shape[0], ids.shape[1], block, device)
    return Canvas(
        ids=ids,
        lengths=lengths,
        is_open=ids == special.mask,
        blocks=blocks,
        block_size=block,
        pattern=pattern,
        prompt_lengths=torch.zeros_like(lengths),
        response_ends=lengths,
        most_new=block,
        num_shares=len(blocks),
    )


def reveal_for(canvas: Canvas, config: GenerationConfig) -> Reveal:
    """Return how many tokens a step commits. `steps` are shared out among the blocks; unset: one a token."""
    is_block_causal = isinstance(canvas.pattern, BlockCausal)
    threshold = THRESHOLD if config.threshold is None and is_block_causal else config.threshold
    if config.factor is not None:
        return Factor(factor=config.factor)
    if config.editing_threshold is not None or config.num_to_transfer is not None:
        if threshold is None:
            raise ConfigError(
                "editing_threshold and num_to_transfer need to know what is sure enough to be committed; set threshold."
            )
        return AtLeast(threshold=threshold, num_to_transfer=config.num_to_transfer or 1)
    steps = config.steps_per_block
    if steps is None:
        steps = canvas.block_size if config.steps is None else math.ceil(config.steps / canvas.num_shares)
    if threshold is not None:
        _refuse_unread(config)
        return Above(threshold=threshold, block_size=canvas.block_size, steps=min(steps, _most_steps(canvas, config)))
    if config.minimal_topk != 1:
        raise ConfigError(
            f"minimal_topk={config.minimal_topk} has no effect on this model without a threshold; set threshold, or "
            "say how many steps with steps."
        )
    if config.transfer_schedule == "llada":
        return Even(steps=steps)
    return Scheduled(steps=steps, is_stochastic=bool(config.stochastic_transfer))


def _most_steps(canvas: Canvas, config: GenerationConfig) -> int:
    """Return how many steps a block may take, as published: so few that each commits `minimal_topk` tokens."""
    most = canvas.most_new // (config.minimal_topk or 1)
    if most == 0:
        raise ConfigError(
            f"minimal_topk={config.minimal_topk} is more than the {canvas.most_new} tokens asked for, which leaves no "
            "step to decode them; lower it."
        )
    return most


def _refuse_unread(config: GenerationConfig) -> None:
    """Raise ConfigError for what a block-causal family does not read: it always looks at confidences."""
    for name, plain in (("transfer_schedule", "dllm"), ("stochastic_transfer", False), ("remasking", "low_confidence")):
        if getattr(config, name) != plain:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no effect on this model: what is surer than a threshold is "
                f"committed, {THRESHOLD} where none is set. Leave {name} out."
            )


def sampler_for(canvas: Canvas, config: GenerationConfig, special: SpecialIds) -> TokenSampler:
    """Return how logits become tokens."""
    forbids = config.begin_suppress == "forbid"
    begin = config.begin_suppress_tokens or ()
    return TokenSampler(
        mask_token_id=special.mask,
        remasking=make_confidence(config.remasking or "low_confidence"),
        temperature=config.temperature or 0.0,
        top_k=config.top_k,
        top_p=config.top_p,
        suppress=(*(config.suppress_tokens or ()), *(begin if forbids else ())),
        postpone=() if forbids else begin,
        is_tempered=isinstance(canvas.pattern, BlockCausal),
    )


def edit_for(config: GenerationConfig) -> Edit | None:
    """Return whether committed tokens may change."""
    if config.editing_threshold is None:
        return None
    return Edit(threshold=config.editing_threshold, max_post_steps=config.max_post_steps or 0)


def _check_room(rows: int, length: int, block_size: int | None) -> None:
    """Every block is a set of positions of the whole canvas."""
    if rows * length * (length // (block_size or length) + 1) > MOST_PLACES:
        raise ConfigError(
            f"{rows} rows of {length} tokens in blocks of {block_size} take more than {MOST_PLACES} bytes of "
            "positions; raise block_size, or decode fewer rows or tokens."
        )


def _warn_if_long(model: nn.Module, length: int) -> None:
    places = trained_positions(model)
    if places is not None and length > places:
        warnings.warn(
            f"prompt and response have {length} tokens, but the model was trained on {places} positions "
            "(max_position_embeddings): those beyond are extrapolated. Shorten the prompt or max_new_tokens.",
            stacklevel=5,
        )
