"""prompt -> text: generate, stream and infill, for any mix of prompt lengths, with or without a memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.diffusion.guidance import ClassifierFree
from memdlm.diffusion.likelihood import Likelihood, monte_carlo_nll
from memdlm.diffusion.sampling import (
    Rule,
    Step,
    absolute_blocks,
    blocks_after_prompt,
    denoise_canvas,
    make_commit,
)
from memdlm.errors import ConfigError, DataError
from memdlm.inference.config import GenerationConfig
from memdlm.inference.prompts import Prompt, SpecialIds, encode_prompts, pad, special_ids, visible
from memdlm.memory.inner_loop import Written
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.denoiser import ModelDenoiser
from memdlm.randomness import Randomness, derive
from memdlm.types import IGNORE_INDEX, Denoise, Ids, Logits, Positions, PositionSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What came out, and what it cost."""

    sequences: list[Tensor]
    """Per prompt, a 1-D int64 tensor: the prompt and its response, which ends with the first EOS, if any."""
    texts: list[str]
    """The responses alone, without special tokens."""
    num_forward_passes: int
    num_token_positions: int
    """Positions that went through the network, summed over passes."""
    num_tokens: int
    """Tokens generated, up to each response's end."""
    unresolved: int
    """Positions that still hold [MASK]; 0 unless something is wrong."""


@final
class Metered(Denoise):
    """Counts what a denoiser is asked for."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.passes, self.positions = 0, 0

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Count and pass on."""
        self.passes, self.positions = self.passes + 1, self.positions + ids.numel()
        return self.denoise.logits(ids, positions)

    def hidden(self, ids: Ids, positions: Positions) -> Tensor:
        """Count and pass on."""
        self.passes, self.positions = self.passes + 1, self.positions + ids.numel()
        return self.denoise.hidden(ids, positions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Canvas:
    """A batch to be filled."""

    ids: Ids
    attention_mask: Tensor
    is_open: PositionSet
    blocks: list[PositionSet]
    steps_per_block: int
    prompt_lengths: Tensor


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
) -> Generation:
    """Decode a response to each of `prompts` (texts, lists of messages, or lists of ids; lengths may differ).

    With a `memory`, each prompt is written before it is decoded. `generator` draws memories and samples; None: a
    fixed one. Raises DataError for an empty prompt and ConfigError for options that cannot be honoured.
    """
    config = GenerationConfig() if config is None else config
    special = special_ids(tokenizer)
    rows = encode_prompts(tokenizer, prompts)
    canvas = _response_canvas(rows, config, special, _device(model))
    meter = Metered(_denoiser(model, canvas, config))
    ids = canvas.ids
    for step in _decode(meter, canvas, config, special, rows, memory, generator):
        ids = step.ids
    return _result(ids, canvas, special, tokenizer, meter)


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
) -> Iterator[Step]:
    """Decode like `generate`, but yield after every denoising step, for live display."""
    config = GenerationConfig() if config is None else config
    special = special_ids(tokenizer)
    rows = encode_prompts(tokenizer, prompts)
    canvas = _response_canvas(rows, config, special, _device(model))
    yield from _decode(_denoiser(model, canvas, config), canvas, config, special, rows, memory, generator)


def infill(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
) -> Generation:
    """Fill the mask tokens inside `sequences` (texts with mask tokens, or ids), in absolute blocks of `block_size`.

    `max_new_tokens` and `max_length` play no part. With a `memory`, the given tokens of each sequence are written.
    `texts` are the whole sequences. Raises DataError when a sequence has no mask token.
    """
    config = GenerationConfig() if config is None else config
    special = special_ids(tokenizer)
    rows = encode_prompts(tokenizer, sequences)
    canvas = _infill_canvas(rows, config, special, _device(model))
    meter = Metered(_denoiser(model, canvas, config))
    ids = canvas.ids
    for step in _decode(meter, canvas, config, special, rows, memory, generator):
        ids = step.ids
    filled = [ids[index, : row.numel()].cpu() for index, row in enumerate(rows)]
    return Generation(
        sequences=filled,
        texts=[tokenizer.decode(row, skip_special_tokens=True) for row in filled],
        num_forward_passes=meter.passes,
        num_token_positions=meter.positions,
        num_tokens=int(canvas.is_open.sum()),
        unresolved=sum(int((row == special.mask).sum()) for row in filled),
    )


def score(
    model: nn.Module,
    prompt_ids: Tensor,
    target_ids: Tensor,
    num_samples: int = 128,
    *,
    memory: ParametricMemory | None = None,
    generator: torch.Generator | None = None,
    mask_token_id: int | None = None,
    batch_size: int = 16,
    right_shift_logits: bool = False,
) -> Likelihood:
    """Bound -log p(target | prompt) in nats by Monte Carlo, with `.stderr`; a `memory` writes the prompt first.

    `prompt_ids` [P] and `target_ids` [T] are 1-D; `right_shift_logits` is that of `GenerationConfig`. The mask token
    comes from `mask_token_id`, the memory, or the model's configuration; ConfigError when none of them has it.
    """
    mask = mask_token_id
    if mask is None:
        mask = memory.mask_token_id if memory is not None else getattr(model.config, "mask_token_id", None)
    if mask is None:
        raise ConfigError(
            "mask_token_id: the model's configuration has none; pass mask_token_id=tokenizer.mask_token_id."
        )
    generator = derive("memdlm.score", 0) if generator is None else generator
    device = _device(model)
    prompt_ids, target_ids = prompt_ids.to(device), target_ids.to(device)
    writes = memory is not None and prompt_ids.numel() > 0
    with (
        memory.write(prompt_ids[None], generator=generator) if memory is not None and writes else nullcontext(),
        torch.no_grad(),
    ):
        return monte_carlo_nll(
            ModelDenoiser(model, right_shift_logits=right_shift_logits),
            prompt_ids,
            target_ids,
            mask_token_id=int(mask),
            num_samples=num_samples,
            batch_size=min(batch_size, num_samples),
            generator=generator,
        )


def _decode(
    denoise: Denoise,
    canvas: Canvas,
    config: GenerationConfig,
    special: SpecialIds,
    rows: Sequence[Tensor],
    memory: ParametricMemory | None,
    randomness: Randomness | None,
) -> Iterator[Step]:
    randomness = derive("memdlm.generate", 0) if randomness is None else randomness
    draws = randomness if isinstance(randomness, torch.Generator) else randomness[0]
    rule = Rule(
        mask_token_id=special.mask,
        commit=make_commit(config.remasking),
        temperature=config.temperature,
        suppress=config.suppress_tokens,
        postpone=config.begin_suppress_tokens,
    )
    if config.cfg_scale > 0:
        is_given = canvas.attention_mask.bool() & ~canvas.is_open
        if config.cfg_keep_tokens:
            is_given &= ~torch.isin(canvas.ids, torch.tensor(config.cfg_keep_tokens, device=canvas.ids.device))
        denoise = ClassifierFree(denoise, is_given, mask_token_id=special.mask, scale=config.cfg_scale)
    with nullcontext() if memory is None else _written(memory, canvas, rows, special, randomness):
        yield from denoise_canvas(
            denoise,
            canvas.ids,
            canvas.is_open,
            canvas.blocks,
            steps_per_block=canvas.steps_per_block,
            rule=rule,
            stochastic=config.stochastic_transfer,
            generator=draws,
        )


def _written(
    memory: ParametricMemory,
    canvas: Canvas,
    rows: Sequence[Tensor],
    special: SpecialIds,
    randomness: Randomness,
) -> AbstractContextManager[Written]:
    """Open `memory` on the given tokens of every row: its prompt, or what an infilling leaves open."""
    ids, lengths = pad(rows, special.eos)
    ids, lengths = ids.to(canvas.ids.device), lengths.to(canvas.ids.device)
    is_real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    labels = ids.masked_fill(~is_real | (ids == special.mask), IGNORE_INDEX)
    return memory.write(ids, labels, is_real, randomness)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _denoiser(model: nn.Module, canvas: Canvas, config: GenerationConfig) -> ModelDenoiser:
    mask = canvas.attention_mask
    # A mask that hides nothing would only cost the fast attention path.
    return ModelDenoiser(
        model,
        attention_mask=None if bool(mask.all()) else mask,
        right_shift_logits=config.right_shift_logits,
    )


def _response_canvas(
    rows: Sequence[Tensor], config: GenerationConfig, special: SpecialIds, device: torch.device
) -> Canvas:
    longest = max(row.numel() for row in rows)
    new = config.max_new_tokens if config.max_new_tokens is not None else (config.max_length or 0) - longest
    if new < 1:
        raise ConfigError(f"max_length {config.max_length} leaves no room after a prompt of {longest} tokens.")
    ids, lengths = pad(rows, special.eos, longest + new)
    ids, lengths = ids.to(device), lengths.to(device)
    column = torch.arange(ids.shape[1], device=device)
    is_open = (column >= lengths[:, None]) & (column < lengths[:, None] + new)
    block = min(config.block_size or new, new)
    blocks = blocks_after_prompt(lengths, ids.shape[1], new, block)
    return Canvas(
        ids=ids.masked_fill(is_open, special.mask),
        attention_mask=column < lengths[:, None] + new,
        is_open=is_open,
        blocks=blocks,
        steps_per_block=math.ceil((config.steps or new) / len(blocks)),
        prompt_lengths=lengths,
    )


def _infill_canvas(
    rows: Sequence[Tensor], config: GenerationConfig, special: SpecialIds, device: torch.device
) -> Canvas:
    for index, row in enumerate(rows):
        if not bool((row == special.mask).any()):
            raise DataError(f"sequence {index} has no mask token: there is nothing to fill.")
    ids, lengths = pad(rows, special.eos)
    ids, lengths = ids.to(device), lengths.to(device)
    is_open = ids == special.mask
    blocks = absolute_blocks(ids.shape[0], ids.shape[1], config.block_size or ids.shape[1], device)
    steps = config.steps or int(is_open.sum(-1).max())
    return Canvas(
        ids=ids,
        attention_mask=torch.arange(ids.shape[1], device=device) < lengths[:, None],
        is_open=is_open,
        blocks=blocks,
        steps_per_block=math.ceil(steps / len(blocks)),
        prompt_lengths=lengths,
    )


def _result(
    ids: Ids, canvas: Canvas, special: SpecialIds, tokenizer: PreTrainedTokenizerBase, meter: Metered
) -> Generation:
    sequences, texts, tokens, unresolved = [], [], 0, 0
    ends = canvas.attention_mask.sum(-1).tolist()
    for row, start, end in zip(ids.cpu(), canvas.prompt_lengths.tolist(), ends, strict=True):
        response = row[start:end]
        is_eos = response == special.eos
        if bool(is_eos.any()):
            response = response[: int(is_eos.int().argmax()) + 1]
        sequences.append(torch.cat((row[:start], response)))
        texts.append(tokenizer.decode(visible(response, special.ends), skip_special_tokens=True))
        tokens += response.numel()
        unresolved += int((response == special.mask).sum())
    return Generation(
        sequences=sequences,
        texts=texts,
        num_forward_passes=meter.passes,
        num_token_positions=meter.positions,
        num_tokens=tokens,
        unresolved=unresolved,
    )
