"""From a folder or hub name to a model and a tokenizer that are ready to use, and back to a folder."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from memdlm.errors import CheckpointError, ConfigError, unknown
from memdlm.models.families import FAMILIES, Family, family_of, register

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a masked diffusion language model, in eval mode.

    `name_or_path` is a folder or a hub name; `dtype` "auto" keeps the checkpoint's; `device` None means the CPU.
    Raises CheckpointError when the folder is missing or damaged, the family is unknown, or any tensor is missing,
    unexpected or of the wrong size; ConfigError for an unknown dtype.
    """
    family, config = _resolve(str(name_or_path))
    arguments: dict[str, Any] = {"config": config, "dtype": _dtype(dtype)}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    try:
        model, info = family.lm_class.from_pretrained(
            str(name_or_path), output_loading_info=True, ignore_mismatched_sizes=False, **arguments
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{name_or_path}: the weights could not be read: {error}") from error
    problems = {key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys")}
    if any(problems.values()):
        words = "; ".join(f"{key.replace('_keys', '')}: {', '.join(names)}" for key, names in problems.items() if names)
        raise CheckpointError(f"{name_or_path}: tensors do not match the {family.name} family. {words}.")
    return (model if device is None else model.to(device)).eval()


def build_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """Create a randomly initialised model; the same seed gives the same weights, global random state untouched."""
    register()
    family = family_of(config)
    if family is None:
        raise ConfigError(unknown("config:", type(config).__name__, [f.config_class.__name__ for f in FAMILIES]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.lm_class(config)
    model.prepare_new()
    return model


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer with its mask token, end-of-turn token, padding and right padding side set.

    Raises CheckpointError when there is no tokenizer, when it has neither EOS nor PAD, or when it lacks the mask
    token: a model that was trained for masked diffusion has a trained embedding for that token, so none is added.
    """
    register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), padding_side="right")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name_or_path}: no tokenizer could be loaded: {error}") from error
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise CheckpointError(f"{name_or_path}: the tokenizer has neither an EOS nor a PAD token; set one of them.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.pad_token
    _set_mask_token(tokenizer, str(name_or_path))
    return tokenizer


def _set_mask_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.mask_token is not None:
        return
    candidates = sorted({family.mask_token for family in FAMILIES})
    vocabulary = tokenizer.get_vocab()
    for token in candidates:
        if token in vocabulary:
            tokenizer.mask_token = token
            return
    raise CheckpointError(
        f"{name}: the tokenizer has no mask token. It sets none, and its vocabulary of {len(vocabulary)} has none of "
        f"{', '.join(candidates)}. Load the tokenizer that belongs to a masked diffusion model."
    )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype:", dtype, ["auto", *DTYPES]))
    return DTYPES[dtype]


def _resolve(name: str) -> tuple[Family, PreTrainedConfig]:
    register()
    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise CheckpointError(f"model: the folder {name!r} does not exist.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"model: {name!r} could not be loaded: {error}") from error
    family = family_of(config)
    if family is None:
        known = [each.name for each in FAMILIES]
        raise CheckpointError(unknown(f"model {name!r}: family", config.model_type, known))
    return family, config
