"""`Decoder`, a model with all that decoding needs, and `Job`, one decoding: a canvas that is filled step by step."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.diffusion.choice import TokenSampler
from memdlm.diffusion.guidance import ClassifierFree
from memdlm.diffusion.sampling import Filling, Step, filled
from memdlm.diffusion.stopping import EosStop, StableAnswer
from memdlm.errors import ConfigError
from memdlm.inference.canvas import Canvas, edit_for, infill_canvas, response_canvas, reveal_for, sampler_for
from memdlm.inference.checking import check_parts, check_tokens
from memdlm.inference.compiled import CompiledSteps
from memdlm.inference.config import GenerationConfig
from memdlm.inference.conventions import Conventions, conventions_of, pattern_of, resolved
from memdlm.inference.denoiser import CanvasDenoiser, Meter
from memdlm.inference.prompt_cache import Prefill, PromptCache
from memdlm.inference.prompts import Prompt, SpecialIds, encode_prompts, special_ids, visible
from memdlm.inference.soft import SoftFeedback
from memdlm.inference.views import Approximate, Blocks, FinishedBlocks, UpToBlock, View, WholeRows
from memdlm.memory.inner_loop import Written
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal, Full
from memdlm.models.border.foreign import check_places
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.checking import check_randomness, vocabulary_of
from memdlm.models.networks.shifting import shift_of
from memdlm.models.networks.soundness import blaming
from memdlm.options import Defaulted
from memdlm.padding import right_padded
from memdlm.randomness import Randomness, derive
from memdlm.types import IGNORE_INDEX, Denoise, Ids, PositionSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The result of a decoding, and what it cost."""

    sequences: list[Tensor]
    """Per prompt, a 1-D int64 tensor: the prompt and its response, which ends with the first EOS, if any."""
    texts: list[str]
    """The responses alone, without special tokens."""
    num_forward_passes: int
    num_token_positions: int
    """Positions that went through the network, summed over passes."""
    num_reused_positions: int
    """Positions of prompts that a `prompt_cache` held; only the blocks that a memory changes ran on them."""
    num_tokens: int
    """Tokens generated, up to each response's end."""
    unresolved: int
    """Positions of the responses that still hold [MASK]; 0 unless something is wrong."""


@final
@dataclass(frozen=True, eq=False)
class Decoder:
    """A model and how it decodes; `generate`, `stream` and `infill` do what the functions of these names do.

    Raises ConfigError for parts that do not fit together.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: Defaulted[GenerationConfig] = None  # type: ignore[assignment]
    _: KW_ONLY
    memory: ParametricMemory | None = None
    """Written on every prompt before it is decoded."""
    attention_pattern: AttentionPattern | None = None
    """None: the family's own."""
    prompt_cache: PromptCache | None = None

    def __post_init__(self) -> None:
        check_parts(self.model, self.tokenizer, self.config, self.memory, self.attention_pattern, self.prompt_cache)
        if self.config is None:
            object.__setattr__(self, "config", GenerationConfig())
        check_tokens(self.model, self.special, self.config, self.memory)

    def generate(self, prompts: Sequence[Prompt], generator: Randomness | None = None) -> Generation:
        """Decode a response to each of `prompts`."""
        return self.prepare(prompts, generator).run()

    def stream(self, prompts: Sequence[Prompt], generator: Randomness | None = None) -> Iterator[Step]:
        """Decode like `generate`, but yield after every denoising step."""
        return self.prepare(prompts, generator).steps()

    def infill(self, sequences: Sequence[Prompt], generator: Randomness | None = None) -> Generation:
        """Fill the mask tokens inside `sequences`."""
        return self.prepare(sequences, generator, infills=True).run()

    def prepare(
        self,
        prompts: Sequence[Prompt],
        generator: Randomness | None = None,
        *,
        infills: bool = False,
        device: torch.device | None = None,
    ) -> "Job":
        """Prepare responses to `prompts`, or with `infills` the filling of their mask tokens.

        The canvas is on `device`; None: where the model is.
        """
        if infills and self.prompt_cache is not None:
            raise ConfigError("prompt_cache has no effect on an infilling; leave it out.")
        rows = encode_prompts(self.tokenizer, prompts, vocabulary_of(self.model))
        lay_out = infill_canvas if infills else response_canvas
        canvas = lay_out(rows, self.options, self.special, self.pattern, self.model)
        check_randomness(generator, len(rows))
        check_places(self.model, canvas.ids.shape[1], "prompt and response")
        # One generator per row, all seeded alike: every row gets the numbers that it would get alone.
        randomness = [derive("memdlm.generate", 0) for _ in rows] if generator is None else generator
        canvas = canvas.on(next(self.model.parameters()).device if device is None else device)
        return Job(decoder=self, rows=rows, canvas=canvas, randomness=randomness, infills=infills)

    def configured(self, config: GenerationConfig) -> "Decoder":
        """Return a decoder with other options, and neither memory nor prompt cache; the tokenizer is not read again."""
        check_parts(self.model, self.tokenizer, config, None, self.attention_pattern)
        check_tokens(self.model, self.special, config, None)
        other = copy.copy(self)
        for name, value in (("config", config), ("memory", None), ("prompt_cache", None)):
            object.__setattr__(other, name, value)
        # What was derived from the options is derived anew; the special tokens are the tokenizer's.
        kept = {field.name for field in fields(self)} | {"special"}
        for name in other.__dict__.keys() - kept:
            del other.__dict__[name]
        return other

    def caching(self, memory: ParametricMemory | None) -> "Decoder":
        """Return this decoder with a prompt cache for `memory` (or None), or itself where no cache can be used."""
        is_usable = self.is_cacheable and self.options.attention == "block_causal" and self.options.cache == "exact"
        if not is_usable or (memory is not None and memory.first_block == 0):
            return self
        return replace(self, prompt_cache=PromptCache(self.model, memory))

    @cached_property
    def special(self) -> SpecialIds:
        """The tokens that decoding needs to know."""
        return special_ids(self.tokenizer)

    @cached_property
    def pattern(self) -> AttentionPattern:
        """Which positions attend to which."""
        attention, network = self.config.attention, unwrap(self.model)
        if self.attention_pattern is not None and attention is not None:
            raise ConfigError(f"attention={attention!r} and attention_pattern say the same; leave one of them out.")
        if attention not in (None, "full") and not isinstance(network, MaskedDiffusionLM):
            raise ConfigError(
                f"attention={attention!r} is for memdlm's own families, not for {type(network).__name__}; leave it out."
            )
        if self.attention_pattern is not None:
            return self.attention_pattern
        return pattern_of(self._published, self.config)

    @cached_property
    def conventions(self) -> Conventions:
        """How the family's published sampler decodes."""
        return conventions_of(self._published, self.pattern)

    @cached_property
    def options(self) -> GenerationConfig:
        """The configuration with the family's defaults filled in."""
        shift = shift_of(self.model, self.config.right_shift_logits)
        return replace(resolved(self.config, self.pattern, self.conventions), right_shift_logits=shift)

    @cached_property
    def sampler(self) -> TokenSampler:
        """How logits become tokens."""
        return sampler_for(self.options, self.conventions, self.special)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens with the first of which a response ends."""
        ends = self.special.ends if self.conventions.ends_with_turn else (self.special.eos,)
        return (*ends, *self.config.stop_tokens)

    @cached_property
    def text_ends(self) -> tuple[int, ...]:
        """The tokens before the first of which the text of a response ends."""
        return (*self.special.ends, *self.config.stop_tokens)

    @property
    def is_cacheable(self) -> bool:
        """Whether keys and values of earlier passes can be used again."""
        network = unwrap(self.model)
        return isinstance(network, MaskedDiffusionLM) and network.model.is_cacheable

    @property
    def _published(self) -> object:
        return getattr(unwrap(self.model), "config", None)

    def blocks(self, canvas: Canvas) -> Blocks | None:
        """Return where the blocks of a block-causal pattern lie, or None for another pattern."""
        return Blocks.of_size(self.pattern.block, canvas.offsets) if isinstance(self.pattern, BlockCausal) else None

    def view(self, canvas: Canvas) -> View:
        """Return how much each pass recomputes: as little as keeps the tokens the same, unless `cache` approximates."""
        options, pattern, length = self.options, self.pattern, canvas.ids.shape[1]
        if options.cache == "approximate":
            if not self.is_cacheable or not isinstance(pattern, Full) or options.right_shift_logits:
                raise ConfigError(
                    "cache='approximate' is for LLaDA and LLaDA-MoE with full attention and without "
                    f"right_shift_logits, not for {type(unwrap(self.model)).__name__} with {pattern}; leave cache out "
                    "(LLaDA2.x has an exact one)."
                )
            return Approximate(canvas.lengths, length, refresh=options.cache_refresh, scope=options.cache_scope)
        blocks = self.blocks(canvas)
        if not self.is_cacheable or blocks is None:
            return WholeRows(canvas.lengths)
        if options.cache == "none":
            return UpToBlock(canvas.lengths, blocks)
        return FinishedBlocks(canvas.lengths, blocks, length)

    def prefill(self, view: View) -> Prefill | None:
        """Return what continues from earlier prompts, or None without a prompt cache."""
        if self.prompt_cache is None:
            return None
        self.prompt_cache.check(self.model, self.memory)
        if not isinstance(view, FinishedBlocks):
            raise ConfigError(
                "prompt_cache continues from finished blocks, which only a block-causal pattern with cache='exact' "
                "has; leave prompt_cache out."
            )
        if view.blocks.are_shifted:
            raise ConfigError(
                "prompt_cache continues from blocks that are counted from the first token; with attention='bd3lm' they "
                "are counted from the response, whose place changes. Leave prompt_cache out."
            )
        return Prefill(self.prompt_cache, view)

    def compiled(self, canvas: Canvas) -> CompiledSteps | None:
        """Return what runs repeated passes through torch.compile, or None if `compile` is unset."""
        mode, network = self.options.compile, unwrap(self.model)
        if mode is None:
            return None
        if not isinstance(network, MaskedDiffusionLM) or self.options.right_shift_logits:
            raise ConfigError(
                f"compile {mode!r} is for memdlm's own families without right_shift_logits, not for "
                f"{type(network).__name__}; pass the model through torch.compile before generate."
            )
        return CompiledSteps(network.model, mode, canvas.most_asked)


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """One decoding, prepared; `meter` counts while `steps` runs."""

    decoder: Decoder
    rows: list[Tensor]
    """The given ids, [P] each."""
    canvas: Canvas
    randomness: Randomness
    infills: bool
    """Whether mask tokens in the texts are filled. Otherwise responses are decoded, each up to its end token."""
    meter: Meter = field(default_factory=Meter)

    def run(self) -> Generation:
        """Run all steps."""
        ids = self.canvas.ids
        for step in self.steps():
            ids = step.ids
        return self.result(ids)

    def steps(self) -> Iterator[Step]:
        """Write the memory, if there is one, and fill the canvas; yields after every denoising step.

        Between the steps the model runs without the memory, but no other memory can be opened. Raises NotFiniteError
        when the model computes NaN or infinity.
        """
        decoder, memory = self.decoder, self.decoder.memory
        with nullcontext() if memory is None else self._written(memory), blaming(decoder.model):
            for step in filled(self.filling(), self._denoiser(), decoder.sampler, self.randomness):
                # The caller may use the model between steps, and has not opened a memory.
                with nullcontext() if memory is None else memory.set_aside():
                    yield step

    def filling(self) -> Filling:
        """Return the canvas at its beginning, and the rules by which it is filled."""
        decoder, canvas, options = self.decoder, self.canvas, self.decoder.options
        stops = options.eos_early_stop and not self.infills
        return Filling(
            canvas.ids,
            canvas.is_open,
            canvas.blocks,
            reveal=reveal_for(canvas, options),
            edit=edit_for(options),
            stop=EosStop(decoder.stops, canvas.is_response) if stops else None,
            stable=None if options.stable_steps is None else StableAnswer(options.stable_steps),
            generator=self.randomness,
            draws=decoder.sampler.draws,
        )

    def result(self, ids: Ids) -> Generation:
        """Cut the responses, or the filled texts, out of a final canvas [B, T]."""
        special, decode, stops = self.decoder.special, self.decoder.tokenizer.decode, torch.tensor(self.decoder.stops)
        starts, ends = self.canvas.prompt_lengths.tolist(), self.canvas.response_ends.tolist()
        sequences, texts, tokens, unresolved = [], [], 0, 0
        for row, start, end in zip(ids.cpu(), starts, ends, strict=True):
            response = row[start:end]
            is_end = torch.isin(response, stops)
            if not self.infills and bool(is_end.any()):
                response = response[: int(is_end.int().argmax()) + 1]
            sequences.append(torch.cat((row[:start], response)))
            shown = response if self.infills else visible(response, self.decoder.text_ends)
            texts.append(decode(shown, skip_special_tokens=True))
            tokens += response.numel()
            unresolved += int((response == special.mask).sum())
        return Generation(
            sequences=sequences,
            texts=texts,
            num_forward_passes=self.meter.passes,
            num_token_positions=self.meter.positions,
            num_reused_positions=self.meter.reused,
            num_tokens=int(self.canvas.is_open.sum()) if self.infills else tokens,
            unresolved=unresolved,
        )

    def _denoiser(self) -> Denoise:
        scale, mask = self.decoder.options.cfg_scale, self.decoder.special.mask
        if not scale:
            return self._unguided()
        return ClassifierFree(self._unguided(), self.is_given, mask_token_id=mask, scale=scale, free=self._unguided())

    @property
    def is_given(self) -> PositionSet:
        """[B, T] true at the tokens that guidance masks in its second prediction."""
        canvas, kept = self.canvas, self.decoder.options.cfg_keep_tokens
        is_given = canvas.is_there & ~canvas.is_open
        if kept:
            is_given &= ~torch.isin(canvas.ids, torch.tensor(kept, device=canvas.ids.device))
        return is_given

    def _unguided(self) -> CanvasDenoiser:
        decoder, canvas, options = self.decoder, self.canvas, self.decoder.options
        view, soft = decoder.view(canvas), options.soft_masking(decoder.special.mask)
        return CanvasDenoiser(
            decoder.model,
            view,
            pattern=decoder.pattern if isinstance(unwrap(decoder.model), MaskedDiffusionLM) else None,
            right_shift_logits=options.right_shift_logits,
            meter=self.meter,
            of_rows=None if decoder.memory is None else decoder.memory.of_rows,
            prefill=decoder.prefill(view),
            compiled=decoder.compiled(canvas),
            soft=SoftFeedback(soft, decoder.model, canvas.ids.shape, canvas.ids.device) if options.soft_mask else None,
            blocks=decoder.blocks(canvas) if bool(canvas.offsets.any()) else None,
        )

    def _written(self, memory: ParametricMemory) -> AbstractContextManager[Written]:
        """Write `memory` from the given tokens of every row: its prompt, or all but the mask tokens of an infilling."""
        special, device = self.decoder.special, self.canvas.ids.device
        ids, lengths = right_padded(self.rows, special.eos)
        is_real = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(~is_real | (ids == special.mask), IGNORE_INDEX)
        is_whole = bool(is_real.all())
        ids, labels, is_real = (each.to(device, non_blocking=True) for each in (ids, labels, is_real))
        return memory.write(ids, labels, None if is_whole else is_real, self.randomness)
