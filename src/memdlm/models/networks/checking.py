"""Check what callers pass, once and where it enters: type, shape and range."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError, DataError
from memdlm.models.lora.wrappers import unwrap
from memdlm.options import shortened


def check_model(model: Any) -> None:
    """Raise ConfigError unless `model` is a network with weights."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch module (memdlm.load_model gives one), got {shortened(model)}.")
    # A tensor of a subclass may keep its numbers elsewhere.
    if any(parameter.is_meta and type(parameter.data) is Tensor for parameter in model.parameters()):
        raise ConfigError("model has no weights (they are on the meta device); load it with memdlm.load_model.")


def check_kind(value: Any, kind: type | tuple[type, ...], name: str, wanted: str) -> None:
    """Raise ConfigError unless `value` is a `kind`, which the message calls `wanted`."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be {wanted}, got {shortened(value)}.")


def check_name(value: Any, name: str) -> None:
    """Raise ConfigError unless `value` can be the name of a folder or of a hub repository."""
    text = str(value) if isinstance(value, (str, Path)) else ""
    if not text.strip() or "\0" in text or len(text) > 4000 or not text.isprintable():
        raise ConfigError(f"{name} must name a folder or a hub repository, got {shortened(value)}.")


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many ids the embedding table of `model` has; None if transformers finds no table."""
    give = getattr(unwrap(model), "get_input_embeddings", None)
    try:
        table = None if give is None else give()
    except NotImplementedError:
        return None
    weight = getattr(table, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def check_token(token: Any, name: str, model: nn.Module | None = None) -> int:
    """Return `token`; raises ConfigError unless it is a token id, and in the vocabulary of `model`."""
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        raise ConfigError(f"{name} must be a token's id (tokenizer.{name}), got {shortened(token)}.")
    known = None if model is None else vocabulary_of(model)
    if known is not None and token >= known:
        raise ConfigError(f"{name} {shortened(token)} is no token of the model, which knows 0 to {known - 1}.")
    return token


def check_ids(ids: Any, name: str, *, dim: int, vocabulary: int | None = None) -> None:
    """Raise DataError unless `ids` are int64 of `dim` dimensions, with at least one row, below `vocabulary`.

    Their range is checked only on the CPU: elsewhere that would mean waiting for the device.
    """
    shape = "[B, L]" if dim == 2 else "[L]"
    if not isinstance(ids, Tensor):
        raise DataError(f"{name} must be a tensor of int64, of shape {shape}, got {shortened(ids)}.")
    if ids.dim() != dim or ids.dtype != torch.int64:
        raise DataError(f"{name} must be int64 of shape {shape}, got {ids.dtype} of shape {tuple(ids.shape)}.")
    if dim == 2 and ids.shape[0] == 0:
        raise DataError(f"{name} has no rows.")
    check_range(ids, name, vocabulary)


def check_range(ids: Tensor, name: str, vocabulary: int | None) -> None:
    """Raise DataError unless all of `ids`, if they are on the CPU, are from 0 to `vocabulary` - 1."""
    if vocabulary is None or ids.device.type != "cpu" or ids.numel() == 0:
        return
    least, most = (int(each) for each in ids.aminmax())
    if least < 0 or most >= vocabulary:
        raise DataError(
            f"{name} holds {least if least < 0 else most}, but there are only 0 to {vocabulary - 1}; ids come from the "
            "model's own tokenizer."
        )


def check_positions(positions: Any, hidden: Tensor) -> None:
    """Raise DataError unless `positions` are integers [N] beside `hidden` [B, L, D], on the CPU also below B * L."""
    if not isinstance(positions, Tensor) or positions.dim() != 1 or not is_index(positions):
        raise DataError(f"positions must be int64 of shape [N], got {kind_of(positions)}.")
    check_together(positions, "positions", hidden)
    check_range(positions, "positions", hidden.shape[0] * hidden.shape[1])


def is_index(tensor: Tensor) -> bool:
    """Whether a tensor has a dtype of indices."""
    return tensor.dtype in (torch.int64, torch.int32)


def kind_of(value: Any) -> str:
    """Return a tensor's dtype and shape, or another value in short, for a message."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shortened(value)


def check_same_device(tensor: Tensor, name: str, model: nn.Module) -> None:
    """Raise DataError unless `tensor` is on the device of `model`'s parameters."""
    device = next(model.parameters()).device
    if tensor.device != device:
        raise DataError(f"{name} is on {tensor.device}, the model on {device}; move it: {name}.to(model.device).")


def check_together(tensor: Tensor, name: str, ids: Tensor) -> None:
    """Raise DataError unless `tensor` is on the device of `ids`."""
    if tensor.device != ids.device:
        raise DataError(f"{name} is on {tensor.device}, the ids on {ids.device}; move it: {name}.to(ids.device).")


def check_randomness(generator: Any, rows: int) -> None:
    """Raise ConfigError unless `generator` is None, a torch.Generator, or a list of one per row."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    is_list = isinstance(generator, Sequence) and not isinstance(generator, str)
    if not is_list or not all(isinstance(each, torch.Generator) for each in generator):
        raise ConfigError(f"generator must be a torch.Generator, or a list of one per row, got {shortened(generator)}.")
    if len(generator) != rows:
        raise ConfigError(f"generator: got {len(generator)} generators for {rows} rows; pass one, or one per row.")
