"""One decoding, prepared: a canvas, a denoiser for it, and the memory that is open while it is filled."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.diffusion.guidance import ClassifierFree
from memdlm.diffusion.sampling import Step, denoise_canvas
from memdlm.diffusion.stopping import EosStop, StableAnswer
from memdlm.errors import ConfigError
from memdlm.inference.canvas import (
    Canvas,
    edit_for,
    infill_canvas,
    pattern_for,
    response_canvas,
    reveal_for,
    sampler_for,
)
from memdlm.inference.checking import check_parts, check_tokens
from memdlm.inference.compiled import CompiledSteps
from memdlm.inference.config import GenerationConfig
from memdlm.inference.denoiser import CanvasDenoiser, Meter
from memdlm.inference.prompt_cache import Prefill, PromptCache
from memdlm.inference.prompts import Prompt, SpecialIds, encode_prompts, pad, special_ids
from memdlm.inference.soft import SoftFeedback
from memdlm.inference.views import Approximate, FinishedBlocks, UpToBlock, View, WholeRows
from memdlm.memory.inner_loop import Written
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal, Full
from memdlm.models.border.foreign import check_places
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.checking import check_randomness, vocabulary_of
from memdlm.models.networks.soundness import blaming
from memdlm.randomness import Randomness, derive
from memdlm.types import IGNORE_INDEX, Denoise


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """What `steps` runs; `meter` counts while it does."""

    model: nn.Module
    config: GenerationConfig
    special: SpecialIds
    rows: list[Tensor]
    """What was given, [P] ids each."""
    canvas: Canvas
    memory: ParametricMemory | None
    randomness: Randomness
    meter: Meter
    stops: bool
    """Whether end tokens may finish a row."""
    prompt_cache: PromptCache | None = None

    def steps(self) -> Iterator[Step]:
        """Write the memory, if there is one, and fill the canvas; yields after every denoising step.

        Between the steps the model is bare, and held: no other memory can be opened. Raises NotFiniteError when the
        model computes NaN or infinity.
        """
        canvas, config = self.canvas, self.config
        stable = None if config.stable_steps is None else StableAnswer(config.stable_steps)
        stop = EosStop((self.special.eos,), canvas.is_response) if self.stops and config.eos_early_stop else None
        with nullcontext() if self.memory is None else self._written(self.memory), blaming(self.model):
            for step in denoise_canvas(
                self._denoiser(),
                canvas.ids,
                canvas.is_open,
                canvas.blocks,
                sampler=sampler_for(canvas, config, self.special),
                reveal=reveal_for(canvas, config),
                edit=edit_for(config),
                stop=stop,
                stable=stable,
                generator=self.randomness,
            ):
                # Whoever looks at the step may call the model too, and opened no memory.
                with nullcontext() if self.memory is None else self.memory.set_aside():
                    yield step

    def _denoiser(self) -> Denoise:
        canvas, config = self.canvas, self.config
        if not config.cfg_scale:
            return self._plain()
        is_given = canvas.is_there & ~canvas.is_open
        if config.cfg_keep_tokens:
            is_given &= ~torch.isin(canvas.ids, torch.tensor(config.cfg_keep_tokens, device=canvas.ids.device))
        return ClassifierFree(
            self._plain(), is_given, mask_token_id=self.special.mask, scale=config.cfg_scale, free=self._plain()
        )

    def _plain(self) -> CanvasDenoiser:
        view = _view(self.model, self.canvas, self.config)
        return CanvasDenoiser(
            self.model,
            view,
            pattern=self.canvas.pattern if isinstance(unwrap(self.model), MaskedDiffusionLM) else None,
            right_shift_logits=bool(self.config.right_shift_logits),
            meter=self.meter,
            of_rows=None if self.memory is None else self.memory.of_rows,
            prefill=None if self.prompt_cache is None else _prefill(self.prompt_cache, view, self.model, self.memory),
            compiled=None if self.config.compile is None else self._compiled(self.config.compile),
            soft=self._soft(),
        )

    def _soft(self) -> SoftFeedback | None:
        soft, ids = self.config.soft(self.special.mask), self.canvas.ids
        return None if soft is None else SoftFeedback(soft, self.model, ids.shape, ids.device)

    def _compiled(self, mode: str) -> CompiledSteps:
        network = unwrap(self.model)
        if not isinstance(network, MaskedDiffusionLM) or self.config.right_shift_logits:
            raise ConfigError(
                f"compile {mode!r} covers our families without right_shift_logits; {type(network).__name__} can be "
                "passed through torch.compile before generate."
            )
        return CompiledSteps(network.model, mode, self.canvas.most_asked)

    def _written(self, memory: ParametricMemory) -> AbstractContextManager[Written]:
        """Open `memory` on the given tokens of every row: its prompt, or what an infilling leaves open."""
        device = self.canvas.ids.device
        ids, lengths = pad(self.rows, self.special.eos)
        is_real = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(~is_real | (ids == self.special.mask), IGNORE_INDEX)
        is_whole = bool(is_real.all())
        ids, labels, is_real = (each.to(device, non_blocking=True) for each in (ids, labels, is_real))
        return memory.write(ids, labels, None if is_whole else is_real, self.randomness)


def _view(model: nn.Module, canvas: Canvas, config: GenerationConfig) -> View:
    """Return how much each pass recomputes: as little as gives the same tokens, unless asked to approximate."""
    network, pattern, length = unwrap(model), canvas.pattern, canvas.ids.shape[1]
    is_cacheable = isinstance(network, MaskedDiffusionLM) and network.model.is_cacheable
    is_cacheable = is_cacheable and not config.right_shift_logits
    if config.cache == "approximate":
        if not is_cacheable or not isinstance(pattern, Full):
            raise ConfigError(
                "cache='approximate' is for LLaDA and LLaDA-MoE with full attention and without right_shift_logits, "
                f"not for {type(network).__name__} with {pattern}; leave cache out (LLaDA2.x has an exact one)."
            )
        return Approximate(canvas.lengths, length, refresh=config.cache_refresh, scope=config.cache_scope or "dual")
    if not is_cacheable:
        return WholeRows(canvas.lengths)
    if isinstance(pattern, BlockCausal):
        if config.cache == "none":
            return UpToBlock(canvas.lengths, pattern.block)
        return FinishedBlocks(canvas.lengths, pattern.block, length)
    return WholeRows(canvas.lengths)


def prompt_cache_for(model: nn.Module, memory: ParametricMemory | None, config: GenerationConfig) -> PromptCache | None:
    """Return a cache for calls on `model` with `memory` or without, or None where none can be used."""
    network = unwrap(model)
    is_usable = isinstance(network, MaskedDiffusionLM) and network.model.is_cacheable
    is_usable = is_usable and isinstance(pattern_for(model, config, None), BlockCausal) and config.cache == "exact"
    if not is_usable or config.right_shift_logits or (memory is not None and memory.first_block == 0):
        return None
    return PromptCache(model, memory)


def _prefill(cache: PromptCache, view: View, model: nn.Module, memory: ParametricMemory | None) -> Prefill:
    cache.check(model, memory)
    if not isinstance(view, FinishedBlocks):
        raise ConfigError(
            "prompt_cache continues from finished blocks, which only a block-causal pattern with cache='exact' (and no "
            "right_shift_logits) has; leave prompt_cache out."
        )
    return Prefill(cache, view)


def response_job(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
    prompt_cache: PromptCache | None = None,
) -> Job:
    """Prepare responses to `prompts`; the arguments are those of `generate`."""
    check_parts(model, tokenizer, config, memory, attention_pattern, prompt_cache)
    config = GenerationConfig() if config is None else config
    special = special_ids(tokenizer)
    check_tokens(model, special, config, memory)
    rows = encode_prompts(tokenizer, prompts, vocabulary_of(model))
    canvas = response_canvas(rows, config, special, pattern_for(model, config, attention_pattern), model)
    return _job(model, config, special, rows, canvas, memory, generator, stops=True, prompt_cache=prompt_cache)


def infill_job(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
) -> Job:
    """Prepare the filling of mask tokens in `sequences`; the arguments are those of `infill`."""
    check_parts(model, tokenizer, config, memory, attention_pattern)
    config = GenerationConfig() if config is None else config
    special = special_ids(tokenizer)
    check_tokens(model, special, config, memory)
    rows = encode_prompts(tokenizer, sequences, vocabulary_of(model))
    canvas = infill_canvas(rows, config, special, pattern_for(model, config, attention_pattern), model)
    return _job(model, config, special, rows, canvas, memory, generator, stops=False)


def _job(
    model: nn.Module,
    config: GenerationConfig,
    special: SpecialIds,
    rows: list[Tensor],
    canvas: Canvas,
    memory: ParametricMemory | None,
    generator: Randomness | None,
    *,
    stops: bool,
    prompt_cache: PromptCache | None = None,
) -> Job:
    check_randomness(generator, len(rows))
    check_places(model, canvas.ids.shape[1], "prompt and response")
    # One per row, all alike: every row gets the numbers it would get alone.
    randomness = [derive("memdlm.generate", 0) for _ in rows] if generator is None else generator
    return Job(
        model=model,
        config=config,
        special=special,
        rows=rows,
        canvas=canvas,
        memory=memory,
        randomness=randomness,
        meter=Meter(),
        stops=stops,
        prompt_cache=prompt_cache,
    )
