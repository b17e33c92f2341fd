"""From prompts to a canvas to be filled: what is open, in which blocks, and how many tokens a step commits."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from memdlm.diffusion.blocks import absolute_blocks, absolute_blocks_from, blocks_after_prompt
from memdlm.diffusion.choice import TokenSampler, make_confidence
from memdlm.diffusion.reveal import (
    Above,
    AtLeast,
    ByRow,
    EntropyBounded,
    Even,
    Factor,
    Reveal,
    Scheduled,
    Shares,
    Truncated,
)
from memdlm.diffusion.sampling import Edit
from memdlm.errors import ConfigError, DataError
from memdlm.inference.config import GenerationConfig
from memdlm.inference.conventions import EPS, Conventions
from memdlm.inference.prompts import SpecialIds
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal
from memdlm.models.networks.sizes import trained_positions
from memdlm.padding import right_padded
from memdlm.types import Ids, PositionSet

MOST_PLACES = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a row's steps are counted by. It is the same in every batch."""

    block_size: int
    most_new: int
    """How many tokens were requested; for an infilling, the tokens of a block."""
    num_shares: int
    """Over how many blocks `steps` are spread: as many as the response fills, wherever the prompt ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Canvas:
    """A batch to be filled."""

    ids: Ids
    """[B, T], with mask tokens at the open positions."""
    lengths: Tensor
    """[B] int64 on the CPU: where each row ends; the columns after that are padding."""
    is_open: PositionSet
    blocks: list[PositionSet]
    block_size: int
    prompt_lengths: Tensor
    """[B] int64 on the CPU."""
    response_ends: Tensor
    """[B] int64 on the CPU: where the requested response ends; its last block may reach further."""

    shapes: Sequence["Shape"]
    """Of every row."""
    offsets: Tensor
    """[B] int64 on the CPU: how many columns before the row's first one its first block begins; mostly 0."""

    def on(self, device: torch.device) -> "Canvas":
        """Return the canvas with ids and position sets on `device`."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            is_open=self.is_open.to(device, non_blocking=True),
            blocks=[each.to(device, non_blocking=True) for each in self.blocks],
        )

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
        """[B, T] true at the positions of the response."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        first, last = (
            each.to(self.ids.device, non_blocking=True)[:, None] for each in (self.prompt_lengths, self.response_ends)
        )
        return (column >= first) & (column < last)


def response_canvas(
    rows: Sequence[Tensor], config: GenerationConfig, special: SpecialIds, pattern: AttentionPattern, model: nn.Module
) -> Canvas:
    """Lay out prompts and their responses, on the CPU. Raises ConfigError when `max_length` leaves no room."""
    prompts = torch.tensor([row.numel() for row in rows])
    longest = int(prompts.max())
    new = config.response_length(longest)
    _check_room(len(rows), longest + new, config.block_size)
    ends = prompts + new
    _warn_if_long(model, int(ends.max()))
    offsets = torch.zeros_like(prompts)
    if isinstance(pattern, BlockCausal) and config.attention == "bd3lm":
        # As after padding on the left to a multiple of the block, which is what the published sampler does.
        block, lengths, offsets = pattern.block, ends, -prompts % pattern.block
        blocks = blocks_after_prompt(prompts, int(lengths.max()), new, block)
    elif isinstance(pattern, BlockCausal):
        block = pattern.block
        lengths = -(-ends // block) * block
        blocks = absolute_blocks_from(prompts, int(lengths.max()), new, block)
    else:
        block, lengths = min(config.block_size or new, new), ends
        blocks = blocks_after_prompt(prompts, int(lengths.max()), new, block)
    column = torch.arange(int(lengths.max()))
    is_open = (column >= prompts[:, None]) & (column < lengths[:, None])
    masks = [row.new_full((end - len(row),), special.mask) for row, end in zip(rows, lengths.tolist(), strict=True)]
    ids, _ = right_padded((torch.cat(pair) for pair in zip(rows, masks, strict=True)), special.eos)
    return Canvas(
        ids=ids,
        lengths=lengths,
        is_open=is_open,
        blocks=blocks,
        block_size=block,
        prompt_lengths=prompts,
        response_ends=ends,
        shapes=[Shape(block_size=block, most_new=new, num_shares=math.ceil(new / block))] * len(rows),
        offsets=offsets,
    )


def infill_canvas(
    rows: Sequence[Tensor], config: GenerationConfig, special: SpecialIds, pattern: AttentionPattern, model: nn.Module
) -> Canvas:
    """Lay out texts with mask tokens in them, on the CPU. Raises DataError for a text without one."""
    for index, row in enumerate(rows):
        if not bool((row == special.mask).any()):
            raise DataError(f"sequence {index} has no mask token: there is nothing to fill.")
    ids, lengths = right_padded(rows, special.eos)
    _check_room(len(rows), ids.shape[1], config.block_size)
    _warn_if_long(model, ids.shape[1])
    block = config.block_size or ids.shape[1]
    blocks = absolute_blocks(ids.shape[0], ids.shape[1], block, ids.device)
    return Canvas(
        ids=ids,
        lengths=lengths,
        is_open=ids == special.mask,
        blocks=blocks,
        block_size=block,
        prompt_lengths=torch.zeros_like(lengths),
        response_ends=lengths,
        shapes=[
            Shape(block_size=block, most_new=block, num_shares=math.ceil(length / block))
            for length in lengths.tolist()
            for block in (config.block_size or length,)
        ],
        offsets=torch.zeros_like(lengths),
    )


def reveal_for(canvas: Canvas, config: GenerationConfig) -> Reveal:
    """Return the rule for how many tokens a step commits. `steps` are spread over the blocks; unset: one per token.

    A row's steps depend on its own blocks, never on those of the others.
    """
    if len(set(canvas.shapes)) == 1:
        return _reveal_of(canvas.shapes[0], config)
    rules = {shape: _reveal_of(shape, config) for shape in set(canvas.shapes)}
    return ByRow(rows=[rules[shape] for shape in canvas.shapes])


def _reveal_of(shape: Shape, config: GenerationConfig) -> Reveal:
    threshold, fewest = config.threshold, config.num_to_transfer
    if config.factor is not None:
        return Factor(factor=config.factor)
    if config.eb_threshold is not None:
        return EntropyBounded(bound=config.eb_threshold)
    if config.editing_threshold is not None or fewest is not None:
        if threshold is None:
            raise ConfigError(
                "editing_threshold and num_to_transfer need a confidence above which to commit tokens; set threshold."
            )
        return AtLeast(threshold=threshold, num_to_transfer=1 if fewest is None else fewest)
    steps = config.steps_per_block
    if steps is None:
        steps = shape.block_size if config.steps is None else math.ceil(config.steps / shape.num_shares)
    if threshold is not None:
        # As published: no more steps than commit `minimal_topk` tokens each.
        most = shape.most_new // config.minimal_topk
        if most == 0:
            raise ConfigError(
                f"minimal_topk={config.minimal_topk} is more than the {shape.most_new} tokens asked for, which leaves "
                "no step to decode them; lower it."
            )
        return Above(threshold=threshold, block_size=shape.block_size, steps=min(steps, most))
    if config.minimal_topk != 1:
        raise ConfigError(
            f"minimal_topk={config.minimal_topk} has no effect on this model without a threshold; set threshold, or "
            "set the number of steps with steps."
        )
    if config.transfer_schedule == "llada":
        return Even(steps=steps)
    if config.transfer_schedule == "sdar":
        return Shares(block_size=shape.block_size, steps=steps)
    if config.transfer_schedule == "dream":
        # The predictions of a step that commits nothing matter only to soft-masking, which feeds them back.
        return Truncated(
            steps=steps,
            eps=EPS if config.eps is None else config.eps,
            is_stochastic=config.stochastic_transfer,
            keeps_empty=config.soft_mask,
        )
    return Scheduled(steps=steps, is_stochastic=config.stochastic_transfer)


def edit_for(config: GenerationConfig) -> Edit | None:
    """Return how committed tokens may be edited, or None if they may not."""
    if config.editing_threshold is None:
        return None
    return Edit(threshold=config.editing_threshold, max_post_steps=config.max_post_steps)


def sampler_for(config: GenerationConfig, conventions: Conventions, special: SpecialIds) -> TokenSampler:
    """Return how logits become tokens, for options that are resolved."""
    forbids = config.begin_suppress == "forbid"
    return TokenSampler(
        mask_token_id=special.mask,
        remasking=make_confidence(config.remasking or conventions.remasking),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        suppress=(*config.suppress_tokens, *(config.begin_suppress_tokens if forbids else ())),
        postpone=() if forbids else config.begin_suppress_tokens,
        is_tempered=conventions.is_tempered,
        is_filtered=conventions.is_filtered,
        is_top_p_first=conventions.is_top_p_first,
        alg_temp=config.alg_temp,
    )


def _check_room(rows: int, length: int, block_size: int | None) -> None:
    """Raise ConfigError for too large a canvas: every block is a set of positions of all of it."""
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
            stacklevel=6,
        )
