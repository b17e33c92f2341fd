"""Outer adapters on disk: PEFT's layout with published module names, one tensor pair per expert.

    base_model.model.model.layers.3.mlp.experts.7.up_proj.lora_A.weight

PEFT itself would silently drop the tensors of stacked experts. Here every tensor of a file is used, or loading fails
and lists the others.
"""

import dataclasses
import importlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from memdlm.errors import CheckpointError, ConfigError, did_you_mean
from memdlm.files import flush, make_folder, writing
from memdlm.finite import is_finite
from memdlm.hub import look_for
from memdlm.models.lora.adapters import ALL_LINEAR, Target, adapter_config, attach, check_free, find_targets, slots
from memdlm.models.lora.peft_on_demand import peft
from memdlm.strict_json import (
    Check,
    check_fields,
    is_flag,
    is_list_of,
    is_number,
    is_object,
    is_text,
    is_whole,
    one_of,
    optional,
    read_json,
)

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MADE_BY = {"made_by": "memdlm"}
"""Stands in the header of the weights, and tells our adapters from those of other programs."""
KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
HONOURED = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "base_model_name_or_path"),
    # Which modules were chosen: compared with the tensors.
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
    # About how the adapter was made or is to be opened, not about what it computes.
    *("init_lora_weights", "inference_mode", "task_type", "auto_mapping", "revision", "peft_version"),
    *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
}
"""Fields of a configuration that may have any value."""
NAMES = optional(one_of(is_text, is_list_of(is_text)))
KINDS: dict[str, Check] = {
    "peft_type": is_text,
    "r": lambda value: is_whole(value, 1, 2**20),
    "lora_alpha": lambda value: is_number(value) and value > 0,
    "lora_dropout": lambda value: is_number(value) and 0 <= value < 1,
    "use_rslora": is_flag,
    "inference_mode": is_flag,
    "init_lora_weights": one_of(is_flag, is_text),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), NAMES),
    "layers_to_transform": optional(
        one_of(lambda value: is_whole(value, 0), is_list_of(lambda each: is_whole(each, 0)))
    ),
    "qalora_group_size": lambda value: is_whole(value, 1),
    **dict.fromkeys(("auto_mapping", "megatron_config", "runtime_config"), optional(is_object)),
    **dict.fromkeys(
        ("base_model_name_or_path", "task_type", "revision", "peft_version", "megatron_core"), optional(is_text)
    ),
}
"""A check for the value of each of these fields."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model's weights as they are."""


def load_outer_adapter(model: PreTrainedModel, name: str | Path, *, token: str | bool | None = None) -> PreTrainedModel:
    """Put the adapter in folder or hub repository `name` on top of `model`, trainable; returns the same object.

    Raises CheckpointError when the files are missing or damaged, or ask for something that is not supported, and for a
    tensor that is not used, has the wrong size or lacks its partner; the message lists these. Raises ConfigError when
    the model has an adapter already.
    """
    check_free(model)
    config, tensors = read_adapter(name, token)
    targets = find_targets(model, with_head=True)
    unknown = [module for module in tensors if module not in targets]
    if unknown:
        raise CheckpointError(
            f"adapter {str(name)!r}: {type(model).__name__} has no linear layer for {_listed(unknown)}. "
            f"The adapter belongs to another model.{did_you_mean(unknown[0], list(targets)[:2000])}"
        )
    absent = [module for module in _named(config, model, targets) if module not in tensors]
    if absent:
        raise CheckpointError(f"adapter {str(name)!r}: the tensors of {_listed(absent)} are missing.")
    _check_sizes(name, tensors, {module: _sizes(targets[module]) for module in tensors}, config.r)
    try:
        attach(model, {module: targets[module] for module in tensors}, config)
    except ConfigError as error:
        raise CheckpointError(f"adapter {str(name)!r}: {error}") from error
    _fill(name, model, tensors)
    return model


def reload_outer_adapter(model: nn.Module, name: str | Path) -> None:
    """Set the values of the adapter that `model` has from a file of the same shape (resuming a training run).

    Raises CheckpointError as `load_outer_adapter`, also when rank or scale differ from the model's.
    """
    config, tensors = read_adapter(name)
    own = adapter_config(model)
    if own is None:
        raise CheckpointError(f"adapter {str(name)!r}: the model has no outer adapter to set.")
    for field in ("r", "lora_alpha", "use_rslora"):
        if getattr(own, field) != getattr(config, field):
            raise CheckpointError(
                f"adapter {str(name)!r}: {field} is {getattr(config, field)}, the model's {getattr(own, field)}."
            )
    sizes = {module: (a.shape[-1], b.shape[-2]) for module, a, b, _ in slots(model)}
    unknown = [module for module in tensors if module not in sizes]
    if unknown:
        raise CheckpointError(f"adapter {str(name)!r}: the model's adapter has no {_listed(unknown)}.")
    _check_sizes(name, tensors, sizes, config.r)
    _fill(name, model, tensors)


def save_outer_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model's adapter as adapter_config.json and adapter_model.safetensors, in published names.

    `state_dict`, if given, holds the values by our parameter names, in place of the model's own (sharded training).

    Raises ConfigError when the model has no outer adapter, and when `folder` has one that memdlm did not write, which
    stays; MachineError when the disk is full or may not be written.
    """
    _refuse_others(Path(folder))
    config = adapter_config(model)
    if config is None:
        raise ConfigError("there is no outer adapter to save; add one with add_outer_lora or load_model(adapter=...).")
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for module, a, b, expert in slots(model):
        for side, parameter in (("A", a), ("B", b)):
            value = parameter.detach() if state_dict is None else state_dict[names[parameter]]
            value = value if expert is None else value[expert]
            tensors[parameter_name(module, side)] = value.to("cpu", copy=True).contiguous()
    write_adapter(folder, config, tensors)


def parameter_name(module: str, side: str) -> str:
    """Return the name in a file of matrix `side` (A or B) of a published module."""
    return f"base_model.model.{module}.lora_{side}.weight"


def write_adapter(folder: str | os.PathLike[str], config: "LoraConfig", tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's two files; `tensors` are named by `parameter_name`, on the CPU and contiguous."""
    folder = Path(folder)
    make_folder(folder)
    growing = folder / f".adapter.{os.getpid()}.tmp"
    with writing(folder):
        growing.mkdir()
        try:
            save_file(dict(tensors), growing / WEIGHTS_FILE, metadata={"format": "pt", **MADE_BY})
            dataclasses.replace(config, inference_mode=True).save_pretrained(growing)
            flush(growing)
            for path in growing.iterdir():
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(growing, ignore_errors=True)


def _refuse_others(folder: Path) -> None:
    """Raise ConfigError when `folder` has an adapter of another program."""
    found = [folder / name for name in (WEIGHTS_FILE, CONFIG_FILE) if os.path.lexists(folder / name)]
    if found and not _is_ours(folder / WEIGHTS_FILE):
        raise ConfigError(
            f"{found[0]} exists and memdlm did not write it; it replaces only what it made itself. Name a new folder."
        )


def _is_ours(weights: Path) -> bool:
    if weights.is_symlink() or not weights.is_file():
        return False
    try:
        with safe_open(weights, "pt") as file:
            return MADE_BY.items() <= (file.metadata() or {}).items()
    except (SafetensorError, OSError):
        return False


def base_of_adapter(name: str | Path, *, token: str | bool | None = None) -> str:
    """Return the base model that the adapter in `name` was trained on. Raises CheckpointError when it names none."""
    base = _config(name, token).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"adapter {str(name)!r}: {CONFIG_FILE} names no base_model_name_or_path. Name the base model: "
            "load_model(BASE, adapter=ADAPTER), or --base on the command line."
        )
    if Path(base).is_dir() and Path(base).resolve() == Path(name).resolve():
        raise CheckpointError(
            f"adapter {str(name)!r}: the folder holds the adapter and, it says, the base model too. Move {CONFIG_FILE} "
            f"and {WEIGHTS_FILE} to a folder of their own."
        )
    return str(base)


def is_adapter(name: str | Path, *, token: str | bool | None = None) -> bool:
    """Whether the folder or hub repository `name` holds an adapter; a base model's configuration may lie beside it."""
    return _has(name, CONFIG_FILE, token) and (_has(name, WEIGHTS_FILE, token) or not _has(name, "config.json", token))


def with_tokenizer(adapter: str | Path, base: str | None = None, *, token: str | bool | None = None) -> str:
    """Return `adapter` if a tokenizer was saved there too, else `base` (default: the base model it names)."""
    if any(_has(adapter, file, token) for file in ("tokenizer.json", "tokenizer_config.json")):
        return str(adapter)
    return base_of_adapter(adapter, token=token) if base is None else base


def _has(name: str | Path, file: str, token: str | bool | None) -> bool:
    if Path(name).exists():
        return (Path(name) / file).is_file()
    look_for(name)
    try:
        return (
            cached_file(
                str(name),
                file,
                token=token,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            is not None
        )
    except (OSError, ValueError):
        return False  # no such repository: loading it as a model says why


def read_adapter(
    name: str | Path, token: str | bool | None = None
) -> "tuple[LoraConfig, dict[str, dict[str, Tensor]]]":
    """Return the configuration, and {published module: {"A": [R, in], "B": [out, R]}}, not yet matched with a model.

    Raises CheckpointError when files are missing or damaged, or ask for anything other than plain LoRA.
    """
    config = _config(name, token)
    file = _file(name, WEIGHTS_FILE, token)
    try:
        loaded = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"adapter {str(name)!r}: {WEIGHTS_FILE} could not be read: {error}") from error
    modules: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in loaded.items():
        match = KEY.fullmatch(key)
        if match is None:
            strange.append(key)
        else:
            modules.setdefault(match["module"], {})[match["side"]] = tensor
    if strange:
        raise CheckpointError(
            f"adapter {str(name)!r}: only lora_A and lora_B weights of linear layers are supported, not "
            f"{_listed(strange)}."
        )
    if not modules:
        raise CheckpointError(f"adapter {str(name)!r}: {WEIGHTS_FILE} holds no tensors.")
    _check_numbers(name, modules)
    single = [module for module, sides in modules.items() if len(sides) != 2]
    if single:
        raise CheckpointError(f"adapter {str(name)!r}: lora_A without lora_B, or the reverse: {_listed(single)}.")
    return config, modules


def _check_numbers(name: str | Path, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    for module, sides in modules.items():
        for side, tensor in sides.items():
            if not tensor.is_floating_point() or tensor.dim() != 2 or not bool(is_finite(tensor)):
                raise CheckpointError(
                    f"adapter {str(name)!r}: {module}.lora_{side} is not a matrix of finite numbers, but "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}; the file is damaged, or its training diverged."
                )


def _config(name: str | Path, token: str | bool | None) -> "LoraConfig":
    file = _file(name, CONFIG_FILE, token)
    try:
        fields = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"adapter {str(name)!r}: {CONFIG_FILE} could not be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else fields
        raise CheckpointError(f"adapter {str(name)!r}: peft_type {kind!r} is not supported; only LORA is.")
    plain = peft().LoraConfig()
    defaults = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    for field, value in fields.items():
        asks = bool(value) if field not in defaults else value != defaults[field] and bool(value or defaults[field])
        if field not in HONOURED and asks:
            raise CheckpointError(f"adapter {str(name)!r}: {field}={value!r} is not supported; plain LoRA is.")
    if fields.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise CheckpointError(
            f"adapter {str(name)!r}: init_lora_weights={fields['init_lora_weights']!r} changed the base model's "
            "weights too; convert the adapter to plain LoRA with PEFT (path_initial_model_for_weight_conversion)."
        )
    honoured = {field: value for field, value in fields.items() if field in HONOURED & set(defaults)}
    try:
        check_fields(honoured, {field: KINDS[field] for field in honoured}, CONFIG_FILE)
        return peft().LoraConfig(**honoured)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"adapter {str(name)!r}: {error}") from error


def _file(name: str | Path, file: str, token: str | bool | None) -> str:
    if Path(name).is_dir() and not (Path(name) / file).is_file():
        raise CheckpointError(f"adapter: the folder {str(name)!r} has no {file}.")
    try:
        return str(cached_file(str(name), file, token=token))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"adapter {str(name)!r}: {file} could not be found: {error}") from error


def _named(config: "LoraConfig", model: PreTrainedModel, targets: Mapping[str, Target]) -> list[str]:
    """Return the published names among `targets` that the configuration names, read as PEFT reads it."""
    if not config.target_modules:
        return []
    if config.target_modules == ALL_LINEAR:
        return list(find_targets(model))
    is_named = importlib.import_module("peft.tuners.tuners_utils").check_target_module_exists
    return [module for module in targets if is_named(config, module)]


def _sizes(target: Target) -> tuple[int, int]:
    return target.in_features, target.out_features


def _check_sizes(
    name: str | Path, tensors: dict[str, dict[str, Tensor]], sizes: Mapping[str, tuple[int, int]], rank: int
) -> None:
    wrong = []
    for module, sides in tensors.items():
        wide, narrow = sizes[module]
        for side, expected in (("A", (rank, wide)), ("B", (narrow, rank))):
            if tuple(sides[side].shape) != expected:
                wrong.append(f"{module}.lora_{side} {tuple(sides[side].shape)} instead of {expected}")
    if wrong:
        raise CheckpointError(f"adapter {str(name)!r}: sizes do not fit rank {rank} and the model: {_listed(wrong)}.")


@torch.no_grad()
def _fill(name: str | Path, model: nn.Module, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Copy every tensor to its place; all places must be filled and all tensors used."""
    left = set(tensors)
    for module, a, b, expert in slots(model):
        if module not in left:
            raise CheckpointError(f"adapter {str(name)!r}: the tensors of {module} are missing.")
        left.remove(module)
        for side, parameter in (("A", a), ("B", b)):
            (parameter if expert is None else parameter[expert]).copy_(tensors[module][side])
    if left:
        raise CheckpointError(f"adapter {str(name)!r}: these tensors found no place: {_listed(sorted(left))}.")


def _listed(names: Iterable[str], most: int = 8) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
