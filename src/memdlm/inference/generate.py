"""prompt -> text: generate, stream and infill, for any mix of prompt lengths, with or without a memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.diffusion.sampling import Step
from memdlm.inference.config import GenerationConfig
from memdlm.inference.job import Job, infill_job, response_job
from memdlm.inference.prompt_cache import PromptCache
from memdlm.inference.prompts import Prompt, visible
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.randomness import Randomness
from memdlm.types import Ids


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
    num_reused_positions: int
    """Positions of prompts that a `prompt_cache` held: only the blocks that a memory changes ran on them."""
    num_tokens: int
    """Tokens generated, up to each response's end."""
    unresolved: int
    """Positions of the responses that still hold [MASK]; 0 unless something is wrong."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
    prompt_cache: PromptCache | None = None,
) -> Generation:
    """Decode a response to each of `prompts` (texts, lists of messages, or lists of ids; lengths may differ).

    With a `memory`, each prompt is written before it is decoded. `generator` draws memories and samples: one for the
    batch, or one per row; None: a fixed one per row, so that a row's response is that of running it alone.
    `attention_pattern` None is the family's way: block-causal for LLaDA2.x, else full. A mask token in a prompt stays
    what it is, a blank that the model sees; `infill` fills it. With a `prompt_cache` (block-causal families), what
    earlier calls with it computed for the beginning of a prompt is not computed again; the tokens are the same.

    Warns when prompt and response exceed the positions the model was trained on. Raises DataError for an empty prompt
    and ConfigError for options that cannot be honoured.
    """
    job = response_job(
        model,
        tokenizer,
        prompts,
        config,
        memory=memory,
        generator=generator,
        attention_pattern=attention_pattern,
        prompt_cache=prompt_cache,
    )
    return responses(job, run(job), tokenizer)


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[Step]:
    """Decode like `generate`, but yield after every denoising step, for live display.

    A step's canvas may hold whole blocks beyond `max_new_tokens` (LLaDA2.x).
    """
    job = response_job(
        model,
        tokenizer,
        prompts,
        config,
        memory=memory,
        generator=generator,
        attention_pattern=attention_pattern,
        prompt_cache=prompt_cache,
    )
    yield from job.steps()


def infill(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
) -> Generation:
    """Fill the mask tokens inside `sequences` (texts with mask tokens, or ids), in absolute blocks of `block_size`.

    `max_new_tokens`, `max_length` and `eos_early_stop` play no part; `steps` are shared out among the blocks of the
    longest sequence, as published (`steps_per_block` does not depend on the batch). With a `memory`, the given tokens
    of each sequence are written. `texts` are the whole sequences. A block-causal pattern (the default of LLaDA2.x) does
    not see what follows the block; pass `attention_pattern=Full()` to use both sides. Raises DataError when a sequence
    has no mask token.
    """
    job = infill_job(
        model, tokenizer, sequences, config, memory=memory, generator=generator, attention_pattern=attention_pattern
    )
    return filled(job, run(job), tokenizer)


def run(job: Job) -> Ids:
    """Run all steps and return the final canvas [B, T]."""
    ids = job.canvas.ids
    for step in job.steps():
        ids = step.ids
    return ids


def responses(job: Job, ids: Ids, tokenizer: PreTrainedTokenizerBase) -> Generation:
    """Cut responses out of a final canvas."""
    special = job.special
    sequences, texts, tokens, unresolved = [], [], 0, 0
    starts, ends = job.canvas.prompt_lengths.tolist(), job.canvas.response_ends.tolist()
    for row, start, end in zip(ids.cpu(), starts, ends, strict=True):
        response = row[start:end]
        is_eos = response == special.eos
        if bool(is_eos.any()):
            response = response[: int(is_eos.int().argmax()) + 1]
        sequences.append(torch.cat((row[:start], response)))
        texts.append(tokenizer.decode(visible(response, special.ends), skip_special_tokens=True))
        tokens += response.numel()
        unresolved += int((response == special.mask).sum())
    return _generation(job, sequences, texts, tokens, unresolved)


def filled(job: Job, ids: Ids, tokenizer: PreTrainedTokenizerBase) -> Generation:
    """Cut filled texts out of a final canvas."""
    rows = [row[:length] for row, length in zip(ids.cpu(), job.canvas.lengths.tolist(), strict=True)]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    unresolved = sum(int((row == job.special.mask).sum()) for row in rows)
    return _generation(job, rows, texts, int(job.canvas.is_open.sum()), unresolved)


def _generation(job: Job, sequences: list[Tensor], texts: list[str], tokens: int, unresolved: int) -> Generation:
    return Generation(
        sequences=sequences,
        texts=texts,
        num_forward_passes=job.meter.passes,
        num_token_positions=job.meter.positions,
        num_reused_positions=job.meter.reused,
        num_tokens=tokens,
        unresolved=unresolved,
    )
