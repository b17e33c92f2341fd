"""What `ParametricMemory` is given, checked before anything is opened."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.diffusion.masking import Corrupted
from memdlm.diffusion.schedules import Schedule
from memdlm.errors import DataError
from memdlm.memory.config import MemoryConfig
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.foreign import check_places
from memdlm.models.networks.checking import (
    check_ids,
    check_kind,
    check_model,
    check_randomness,
    check_same_device,
    check_together,
    check_token,
    vocabulary_of,
)
from memdlm.models.networks.sizes import trained_positions
from memdlm.options import shortened


def check_parts(
    model: Any, config: Any, mask_token_id: Any, schedule: Any, pattern: Any, tokenizer: Any, right_shift: Any
) -> None:
    """Raise ConfigError for a part of a memory that is of another kind."""
    check_model(model)
    check_kind(config, (MemoryConfig, type(None)), "config", "a MemoryConfig, or None")
    check_token(mask_token_id, "mask_token_id", model)
    check_kind(schedule, (Schedule, type(None)), "schedule", "a Schedule, or None")
    check_kind(pattern, (AttentionPattern, type(None)), "attention_pattern", "an AttentionPattern, or None")
    check_kind(tokenizer, (PreTrainedTokenizerBase, type(None)), "tokenizer", "a tokenizer of transformers, or None")
    check_kind(right_shift, (bool, type(None)), "right_shift_logits", "True or False, or None")


def check_text(
    model: nn.Module,
    input_ids: Any,
    labels: Any,
    attention_mask: Any,
    generator: Any,
    anchor: Any,
    is_padding: Any,
    pattern: Any,
) -> None:
    """Raise DataError for a text that cannot be written, ConfigError for arguments of another kind."""
    check_model(model)
    check_ids(input_ids, "input_ids", dim=2, vocabulary=vocabulary_of(model))
    if input_ids.shape[1] == 0:
        raise DataError("input_ids has no tokens: there is nothing to write.")
    check_same_device(input_ids, "input_ids", model)
    check_places(model, input_ids.shape[1], "input_ids")
    if labels is not None:
        _check_beside(labels, "labels", input_ids, (torch.int64,))
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        _check_beside(attention_mask, "attention_mask", input_ids, (torch.bool, torch.int64, torch.int32, torch.uint8))
    if is_padding is not None:
        _check_beside(is_padding, "is_padding", input_ids, (torch.bool,))
    check_kind(anchor, (Corrupted, type(None)), "anchor", "a noised batch (Corrupted), or None")
    if anchor is not None:
        _check_beside(anchor.ids, "anchor.ids", input_ids, (torch.int64,))
        _check_beside(anchor.is_masked, "anchor.is_masked", input_ids, (torch.bool,))
    check_kind(pattern, (AttentionPattern, type(None)), "attention_pattern", "an AttentionPattern, or None")
    check_randomness(generator, input_ids.shape[0])


def _check_beside(tensor: Any, name: str, ids: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise DataError(f"{name} must be a tensor of the ids' shape, got {shortened(tensor)}.")
    if tensor.shape != ids.shape:
        raise DataError(f"{name} have shape {tuple(tensor.shape)}, the ids {tuple(ids.shape)}; they must agree.")
    if tensor.dtype not in dtypes:
        raise DataError(f"{name} must be {' or '.join(str(each) for each in dtypes)}, got {tensor.dtype}.")
    check_together(tensor, name, ids)


def warn_if_long(model: nn.Module, length: int) -> None:
    """Warn when more is written at once than the model was trained on."""
    places = trained_positions(model)
    if places is not None and length > places:
        warnings.warn(
            f"input_ids has {length} tokens to be written at once, but the model was trained on {places} positions "
            "(max_position_embeddings): what is written beyond them is extrapolated. Write the text in pieces "
            "(mem_chunk_length).",
            stacklevel=4,
        )
