"""One outer evaluation of a batch: noise it, optionally write a memory, score it (MemDLM Eq. 4 to 8).

Plain functions on tensors; the Trainer only calls them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.diffusion.losses import MaskedLoss, Planner, masked_loss
from memdlm.diffusion.masking import (
    BlockTimes,
    Corrupted,
    corrupt,
    corrupt_blocks,
    draw_times,
    maskable_positions,
    positions_of,
)
from memdlm.diffusion.schedules import Schedule
from memdlm.diffusion.soft_masking import SoftMask
from memdlm.errors import ConfigError, DataError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.inner_loop import Written
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.block_diffusion import BlockDiffusionDenoiser
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.networks.lower_layers import LowerLayers
from memdlm.models.networks.soft_inputs import blended_inputs
from memdlm.randomness import Randomness
from memdlm.training.rows import FIRST_TARGET, PROMPT_WIDTH, WITH_CONTEXT, prompt_columns, prompt_width
from memdlm.types import IGNORE_INDEX, ContextIds, ContextSet, Denoise, Ids, PositionSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A collated batch with its noise."""

    clean: Ids
    labels: Tensor
    attention_mask: Tensor | None
    is_padding: PositionSet | None
    is_maskable: PositionSet
    noised: Corrupted
    context: ContextIds | None = None
    """[B, C] ids that `mem_write_source=context` writes and the network is not shown."""
    is_context: ContextSet | None = None
    """[B, C], false at the context's padding. A row where it is false everywhere has no context."""
    with_context: Sequence[int] | None = None
    """The rows that have a context; None if the host does not know it, or if there are no contexts."""
    prompt_width: int | None = None
    """Number of columns up to the end of the longest prompt; None if the host does not know it."""
    first_target: int = 0
    """Number of columns before the first target of any row; 0 if the host does not know it."""


def learnable(
    labels: Tensor, attention_mask: Tensor | None, is_padding: PositionSet | None, *, spare_padding: bool
) -> PositionSet:
    """Return the positions the outer loss may mask: labelled and visible; no padding with `spare_padding`."""
    is_maskable = maskable_positions(labels, attention_mask)
    return is_maskable & ~is_padding if spare_padding and is_padding is not None else is_maskable


def noise_batch(
    inputs: dict[str, Any],
    times: Tensor,
    uniform: Tensor,
    *,
    schedule: Schedule,
    epsilon: float,
    mask_token_id: int,
    spare_padding: bool,
    block: int | None = None,
) -> Batch:
    """Noise `inputs` with the draws `times` [B] and `uniform` [B, L].

    With `block`, each block of so many columns has its own time, [B, P]. Draws with a dimension of attempts, [B, A]
    (or [B, A, P]) and [B, A, L], are alternatives: a row takes the first that masks a token, or the last.
    """
    mask, is_padding = inputs.get("attention_mask"), inputs.get("is_padding")
    is_maskable = learnable(inputs["labels"], mask, is_padding, spare_padding=spare_padding)
    t = draw_times(times, epsilon)
    if uniform.dim() == 3:
        of_columns = t[..., None] if block is None else t.repeat_interleave(block, dim=-1)[..., : uniform.shape[-1]]
        first = _first_that_masks(is_maskable, uniform < 1 - schedule.alpha(of_columns))
        every = torch.arange(len(first), device=first.device)
        t, uniform = t[every, first], uniform[every, first]
    options: dict[str, Any] = {"schedule": schedule, "mask_token_id": mask_token_id}
    if block is None:
        noised = corrupt(inputs["input_ids"], is_maskable, t, uniform, **options)
    else:
        noised = corrupt_blocks(inputs["input_ids"], is_maskable, BlockTimes(t, block), uniform, **options)
    return Batch(
        clean=inputs["input_ids"],
        labels=inputs["labels"],
        attention_mask=mask,
        is_padding=is_padding,
        is_maskable=is_maskable,
        noised=noised,
        context=inputs.get("context_ids"),
        is_context=inputs.get("is_context"),
        with_context=inputs.get(WITH_CONTEXT),
        prompt_width=inputs.get(PROMPT_WIDTH),
        first_target=inputs.get(FIRST_TARGET, 0),
    )


def _first_that_masks(is_maskable: PositionSet, is_hit: Tensor) -> Tensor:
    """Return [B]: the first attempt of `is_hit` [B, A, L] that masks a token; the last where none does."""
    has_one = (is_hit & is_maskable[:, None]).any(-1)
    return torch.where(has_one.any(-1), has_one.int().argmax(-1), has_one.shape[1] - 1)


def prompt_only(batch: Batch, pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, labels, attention mask), all [B, P], of the prompts: the tokens before a row's first target.

    P is the length of the longest prompt. What follows a shorter prompt is overwritten and hidden, so no part of a
    response can be written. The first column stays visible in every row, because attention needs at least one key.
    """
    parts = batch.labels, batch.attention_mask, batch.is_padding
    # Where the collator gave no width, waiting for the device pays: the write is then as short as the prompts.
    width = prompt_width(*parts) if batch.prompt_width is None else batch.prompt_width
    is_prompt = prompt_columns(*parts)[:, :width]
    ids = batch.clean[:, :width].masked_fill(~is_prompt, pad_token_id)
    is_first = torch.arange(width, device=ids.device) == 0
    return ids, ids.masked_fill(~is_prompt, IGNORE_INDEX), is_prompt | is_first


def visible_only(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (ids, labels, attention mask) of what the noised batch shows: prompts, and unmasked response tokens.

    Tokens that the outer loss scores stay [MASK] and have no label, so they cannot be written.
    """
    is_shown = _genuine(batch) & ~batch.noised.is_masked
    return batch.noised.ids, batch.clean.masked_fill(~is_shown, IGNORE_INDEX), batch.attention_mask


def context_only(batch: Batch, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, labels, attention mask), all [B, C], of the rows' contexts; raises DataError when there are none.

    The first column stays visible in every row, because attention needs at least one key. A mask token in a text is
    never learned.
    """
    if batch.context is None or batch.is_context is None:
        raise DataError(
            "mem_write_source=context, but the rows have no `context_ids`: name the column of the text with "
            "context_column, or add the tokens to the rows."
        )
    is_visible = batch.is_context | (torch.arange(batch.context.shape[1], device=batch.context.device) == 0)
    is_idle = ~batch.is_context | (batch.context == mask_token_id)
    return batch.context, batch.context.masked_fill(is_idle, IGNORE_INDEX), is_visible


def _written_part(memory: ParametricMemory, batch: Batch, pad_token_id: int) -> tuple[Tensor, Tensor, Tensor | None]:
    if memory.config.write_source == "response":
        return batch.clean, batch.labels, batch.attention_mask
    if memory.config.write_source == "prompt":
        return prompt_only(batch, pad_token_id)
    if memory.config.write_source == "context":
        return context_only(batch, memory.mask_token_id)
    return visible_only(batch)


def _genuine(batch: Batch) -> PositionSet:
    """Return [B, L], true where a token is part of the text: neither hidden nor padding."""
    is_genuine = torch.ones_like(batch.clean, dtype=torch.bool)
    if batch.attention_mask is not None and batch.attention_mask.dim() == 2:
        is_genuine = is_genuine & batch.attention_mask.bool()
    return is_genuine if batch.is_padding is None else is_genuine & ~batch.is_padding


def memory_of(
    memory: ParametricMemory,
    batch: Batch,
    *,
    pad_token_id: int,
    randomness: Randomness,
    is_alone: bool = False,
    is_read_at_anchor: bool = True,
    is_whole: bool = False,
    attention_pattern: AttentionPattern | None = None,
    is_of_next_row: bool = False,
) -> AbstractContextManager[Written]:
    """Write the part of the batch that `mem_write_source` names; yield the write's record, with the memory open.

    With `is_of_next_row`, a row reads the memory of the row after it, and the last one that of the first; the only row
    that has one reads nothing. Not with `mem_write_source=response`, whose memories belong to their row's noise. With
    `mem_sync_inner` all ranks take part, unless the write `is_alone`. Block diffusion does not read the anchor's lower
    blocks (`is_read_at_anchor`). A write that `is_whole` is not cut into chunks.

    With `mem_write_source=context`, rows without a context read nothing: they are as without memory. Raises ConfigError
    for such rows where all of a batch share one memory.
    """
    is_own = memory.config.write_source == "response"
    ids, labels, mask = _written_part(memory, batch, pad_token_id)
    rows = rows_with_context(memory.config, batch)
    if rows is not None:
        refuse_bare_rows(memory.config, len(ids) - len(rows), f"the {len(ids)} rows of a batch")
        # Where no row has a context, one is written that teaches nothing: every rank has to count the same figures.
        kept = torch.tensor(rows or (0,)).to(ids.device, non_blocking=True)
        ids, labels, mask = ids[kept], labels[kept], None if mask is None else mask[kept]
        if not isinstance(randomness, torch.Generator):
            randomness = [randomness[row] for row in rows or (0,)]
    shift = -1 if is_of_next_row else 0
    write = memory.write(
        ids.roll(shift, 0),
        labels.roll(shift, 0),
        None if mask is None else mask.roll(shift, 0),
        randomness,
        anchor=batch.noised if is_own else None,
        is_padding=batch.is_padding if is_own else None,
        is_alone=is_alone,
        is_read_at_anchor=is_read_at_anchor,
        is_whole=is_whole,
        attention_pattern=attention_pattern,
    )
    readers = reading_rows(memory.config, batch, is_of_next_row=is_of_next_row)
    return write if readers is None else _read_by(write, memory, readers, len(batch.clean))


@contextmanager
def _read_by(
    write: AbstractContextManager[Written], memory: ParametricMemory, rows: Sequence[int], count: int
) -> Iterator[Written]:
    with write as written, memory.fast.read_by(rows, count):
        yield written


def rows_with_context(config: MemoryConfig, batch: Batch) -> Sequence[int] | None:
    """Return which rows have something to be written; None: all, as ever unless `mem_write_source` is context."""
    if config.write_source != "context" or batch.is_context is None:
        return None
    rows = batch.with_context
    if rows is None:
        # Waits for the device; where the collator told, nothing does.
        rows = batch.is_context.any(1).nonzero().flatten().tolist()
    return None if len(rows) == len(batch.clean) else rows


def reading_rows(config: MemoryConfig, batch: Batch, *, is_of_next_row: bool = False) -> Sequence[int] | None:
    """Return which rows read a memory inside `memory_of`; None: all."""
    rows = rows_with_context(config, batch)
    is_only_one = len(batch.clean if rows is None else rows) == 1
    return () if is_of_next_row and is_only_one else rows


def refuse_bare_rows(config: MemoryConfig, count: int, rows: str) -> None:
    """Raise ConfigError if `count` of `rows` have no context, and could not be trained as without memory."""
    if count and config.per_sample is False:
        raise ConfigError(
            f"mem_per_sample=False: {count} of {rows} have no context, and would read the memory of the others. Set "
            "mem_per_sample=True, or leave such rows out."
        )
    shares = config.batch_shares
    if count and shares is not None and shares.alone:
        raise ConfigError(
            f"mem_batch_mix={config.batch_mix!r}: {count} of {rows} have no context, and in the first share of the "
            f"steps (memory alone) they would see no further than mem_batch_reach={config.batch_reach} tokens. Set the "
            "first share to 0, or leave such rows out."
        )


def score(
    model: nn.Module,
    batch: Batch,
    *,
    schedule: Schedule,
    weighting: str,
    right_shift_logits: bool | None = None,
    lower_layers: LowerLayers | None = None,
    planner: Planner | None = None,
    attention_pattern: AttentionPattern | None = None,
    soft: SoftMask | None = None,
    is_soft: Tensor | None = None,
    norm: str | None = None,
    total_tokens: Tensor | float | None = None,
    total_rows: Tensor | float | None = None,
    block_size: int | None = None,
) -> MaskedLoss:
    """Score the masked tokens of a batch under the model as it is now, with or without an open memory.

    With `block_size`, the network sees each noised block behind the clean blocks before it (block diffusion, see
    `BlockDiffusionDenoiser`), without `lower_layers` and `attention_pattern`; else the noised text alone.

    With `norm` the result has a normalised `loss` to differentiate: see `masked_loss`.
    With `soft`, the rows where `is_soft` [B] see a first pass's predictions in place of [MASK] (soft-masking).

    `lower_layers` of the open memory reuse what its write computed of the same batch.
    """
    denoise: ModelDenoiser | BlockDiffusionDenoiser
    if block_size is None:
        denoise = ModelDenoiser(
            model,
            attention_mask=batch.attention_mask,
            attention_pattern=attention_pattern,
            right_shift_logits=right_shift_logits,
            lower_layers=lower_layers,
        )
    else:
        denoise = BlockDiffusionDenoiser(
            model,
            batch.clean,
            block_size,
            start=batch.first_target,
            attention_mask=batch.attention_mask,
            right_shift_logits=right_shift_logits,
        )
    with _softened(model, denoise, batch, soft, is_soft):
        return masked_loss(
            denoise,
            batch.clean,
            batch.noised,
            batch.is_maskable,
            schedule=schedule,
            weighting=weighting,
            planner=planner,
            norm=norm,
            total_tokens=total_tokens,
            total_rows=total_rows,
        )


def _softened(
    model: nn.Module, denoise: Denoise, batch: Batch, soft: SoftMask | None, is_soft: Tensor | None
) -> AbstractContextManager[None]:
    if soft is None or is_soft is None:
        return nullcontext()
    positions = positions_of(batch.noised.is_masked & is_soft[:, None])
    if positions.numel() == 0:
        return nullcontext()
    return blended_inputs(model, *soft.ask(denoise, batch.noised.ids, positions))
