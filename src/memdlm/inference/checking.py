"""Check the arguments of `generate`, `stream`, `infill` and `score` before anything runs."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.errors import ConfigError, DataError
from memdlm.inference.config import GenerationConfig
from memdlm.inference.prompt_cache import PromptCache
from memdlm.inference.prompts import SpecialIds
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.checking import check_ids, check_kind, check_model, check_token, vocabulary_of
from memdlm.options import shortened

NOTHING = type(None)


def check_parts(model: Any, tokenizer: Any, config: Any, memory: Any, pattern: Any, prompt_cache: Any = None) -> None:
    """Raise ConfigError for an argument of the wrong type, and for a memory of another model."""
    check_model(model)
    check_kind(tokenizer, PreTrainedTokenizerBase, "tokenizer", "a tokenizer (memdlm.load_tokenizer gives one)")
    check_kind(config, (GenerationConfig, NOTHING), "config", "a GenerationConfig, or None")
    check_kind(pattern, (AttentionPattern, NOTHING), "attention_pattern", "an AttentionPattern, or None")
    check_kind(prompt_cache, (PromptCache, NOTHING), "prompt_cache", "a PromptCache, or None")
    check_memory(model, memory)


def check_memory(model: nn.Module, memory: Any) -> None:
    """Raise ConfigError unless `memory` is None or belongs to `model`, which would not read a memory of another."""
    check_kind(memory, (ParametricMemory, NOTHING), "memory", "a ParametricMemory, or None")
    if memory is not None and unwrap(memory.model) is not unwrap(model):
        raise ConfigError("memory belongs to another model; build it for this one: ParametricMemory(model, ...).")


def check_tokens(
    model: nn.Module, special: SpecialIds, config: GenerationConfig, memory: ParametricMemory | None
) -> None:
    """Raise ConfigError for token ids that the model does not know, or that leave it nothing to predict."""
    for name, token in (("mask_token_id", special.mask), ("eos_token_id", special.eos)):
        check_token(token, name, model)
    if memory is not None and memory.mask_token_id != special.mask:
        raise ConfigError(
            f"the memory masks with token {memory.mask_token_id}, the tokenizer's mask token is {special.mask}; build "
            "the memory with mask_token_id=tokenizer.mask_token_id."
        )
    known = vocabulary_of(model)
    if known is None:
        return
    config.check_vocabulary(known)
    forbidden = set(config.suppress_tokens)
    if config.begin_suppress == "forbid":
        forbidden |= set(config.begin_suppress_tokens)
    if len(forbidden | {special.mask}) >= known:
        raise ConfigError(f"suppress_tokens leaves none of the model's {known} tokens to predict; name fewer.")


def check_scoring(model: Any, prompt_ids: Any, target_ids: Any, memory: Any, generator: Any, pattern: Any) -> None:
    """Raise DataError for texts that cannot be scored, ConfigError for arguments of the wrong type."""
    check_model(model)
    check_memory(model, memory)
    check_kind(generator, (torch.Generator, NOTHING), "generator", "a torch.Generator, or None")
    check_kind(pattern, (AttentionPattern, NOTHING), "attention_pattern", "an AttentionPattern, or None")
    for name, ids in (("prompt_ids", prompt_ids), ("target_ids", target_ids)):
        # An empty prompt may have any dtype: torch.tensor([]) is float.
        is_empty_prompt = name == "prompt_ids" and isinstance(ids, Tensor) and tuple(ids.shape) == (0,)
        if not is_empty_prompt:
            check_ids(ids, name, dim=1, vocabulary=vocabulary_of(model))
    if target_ids.numel() == 0:
        raise DataError("target_ids is empty: the likelihood of no tokens is not defined.")


def check_count(value: Any, name: str, most: int = 2**20) -> int:
    """Return `value`; raises ConfigError unless it is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"{name} must be an integer from 1 to {most}, got {shortened(value)}.")
    return value
