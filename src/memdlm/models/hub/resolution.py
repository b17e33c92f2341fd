"""Which family a folder or hub repository holds, read from its configuration and, failing that, its tensor names."""

import json
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from memdlm.errors import CheckpointError, did_you_mean
from memdlm.hub import is_offline, look_for
from memdlm.models.blocks.published import PublishedConfig, config_class_for, config_class_of_tensors
from memdlm.models.hub.families import FAMILIES, Family, family_of, register

log = logging.getLogger(__name__)

INDEX, SINGLE, PICKLED = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"
REAL = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of safetensors in which a whole model can be stored."""
DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    *(NotImplementedError, StrictDataclassError, SafetensorError),
)
"""What transformers and torch raise while they read a damaged configuration, or build a network from one."""


def published_fields(
    name: str, *, revision: str | None = None, token: str | bool | None = None, optional: bool = False
) -> dict[str, Any] | None:
    """Return the fields of `config.json` as they are on disk; None if there is none and it is `optional`.

    Hub names go through huggingface_hub: its cache, and HF_HUB_OFFLINE, are respected. Raises CheckpointError when
    the folder or repository cannot be read or the file is not JSON.
    """
    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise CheckpointError(f"model: the folder {name!r} does not exist.")
    path = find_file(name, "config.json", revision=revision, token=token)
    if path is None:
        if optional:
            return None
        if is_offline(name):
            raise CheckpointError(
                f"model: {name!r} is no folder here and not among the cached models, and the hub cannot be asked. "
                "Correct the name, or load it once while the hub answers."
            )
        raise CheckpointError(f"model: {name!r} has no config.json.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"model: {path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"model: {path} holds a {type(fields).__name__}, not the fields of a configuration.")
    return fields


def resolve_config(
    name: str, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Family | None, PreTrainedConfig]:
    """Return (family, configuration) of the model `name`; the family is None for a foreign model.

    Raises CheckpointError when there is no readable configuration, or it describes no known model.
    """
    register()  # a command may ask before anything is loaded
    fields = published_fields(name, revision=revision, token=token) or {}
    try:
        target = config_class_for(fields) or _by_model_type(fields)
    except TypeError as error:
        raise CheckpointError(f"model: the configuration of {name!r} could not be read: {error}") from error
    if target is None:
        target = _by_prefix(name, fields, revision=revision, token=token)
    if target is None:
        target = config_class_of_tensors(tensor_names(name, revision=revision, token=token))
    if target is None:
        stated = fields.get("model_type")
        known = [family.name for family in FAMILIES]
        raise CheckpointError(
            f"model {name!r}: architectures {fields.get('architectures')} and model_type {stated!r} are not known. "
            f"Possible: {', '.join(known)}, or any masked language model of transformers."
            f"{did_you_mean(str(stated), CONFIG_MAPPING)}"
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, token=token) if target == "auto" else None
        config = target.from_dict(fields) if config is None else config
    except DAMAGE as error:
        raise CheckpointError(f"model: the configuration of {name!r} could not be read: {error}") from error
    return family_of(config), config


def _by_model_type(fields: dict[str, Any]) -> Any:
    """Return "auto" for a model type that identifies the class; those of published families do not."""
    stated = fields.get("model_type")
    if stated not in CONFIG_MAPPING or issubclass(CONFIG_MAPPING[stated], PublishedConfig):
        return None
    return "auto"


def _by_prefix(name: str, fields: dict[str, Any], *, revision: str | None, token: str | bool | None) -> Any:
    """Return the configuration class of a masked language model whose file has no model type, or None.

    Tensors of such a model begin with its type, as in bert.encoder.layer.0. Whether all belong to it is seen when they
    are loaded.
    """
    if fields.get("model_type") is not None or fields.get("architectures"):
        return None
    found = tensor_names(name, revision=revision, token=token) or _pickled_names(name, revision=revision, token=token)
    kinds = {each.partition(".")[0] for each in found} & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    log.warning("%s: config.json states no model_type; the names of its tensors say %s.", name, kind)
    return CONFIG_MAPPING[kind]


def _pickled_names(name: str, *, revision: str | None, token: str | bool | None) -> list[str]:
    """Return the names of tensors in a file of torch's own format, which is read as data, never as a program."""
    path = find_file(name, PICKLED, revision=revision, token=token)
    if path is None:
        return []
    try:
        return [str(each) for each in torch.load(path, map_location="cpu", weights_only=True)]
    except (*DAMAGE, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"model: the weights {path} could not be read: {error}") from error


def find_family(fields: dict[str, Any]) -> Family | None:
    """Return the family that `fields` describe without looking at tensors, or None."""
    target = config_class_for(fields)
    for family in FAMILIES:
        if target is family.config_class or (target is None and fields.get("model_type") == family.model_type):
            return family
    return None


def table_rows(fields: dict[str, Any]) -> int | None:
    """Return how many rows the embedding table has, or None if `fields` do not say."""
    # Elsewhere (ALBERT, ELECTRA) the field of that name is a width.
    is_ours = config_class_for(fields) is not None
    return (fields.get("embedding_size") if is_ours else None) or fields.get("vocab_size")


def tensor_names(name: str, *, revision: str | None = None, token: str | bool | None = None) -> list[str]:
    """Return the names of the checkpoint's tensors, from the index or the header of the only file.

    Empty when there are no safetensors; raises CheckpointError when the file is damaged.
    """
    index = find_file(name, INDEX, revision=revision, token=token)
    if index is not None:
        return list(_weight_map(index))
    single = find_file(name, SINGLE, revision=revision, token=token)
    if single is None:
        return []
    try:
        with safe_open(single, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"model: the weights {single} could not be read: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Return the names of tensors -> the files that hold them."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"model: the index {index} could not be read: {error!r}") from error


def published_dtype(
    name: str, config: PreTrainedConfig, *, revision: str | None = None, token: str | bool | None = None
) -> torch.dtype | None:
    """Return the dtype that the checkpoint's configuration states, else that of its first tensor of real numbers.

    None if neither does, because the safetensors are missing or damaged; loading them says what is wrong.
    """
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    path = find_file(name, SINGLE, revision=revision, token=token)
    if path is None:
        index = find_file(name, INDEX, revision=revision, token=token)
        shards = [] if index is None else sorted(str(file) for file in _weight_map(index).values())
        path = find_file(name, shards[0], revision=revision, token=token) if shards else None
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            stated = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118 - not a mapping
            return next((REAL[each] for each in stated if each in REAL), None)
    except (SafetensorError, OSError):
        return None


def tensor_count(name: str, *, revision: str | None = None, token: str | bool | None = None) -> tuple[int, int] | None:
    """Return (tensors, bytes of their files) of a folder with safetensors; None if that is unknown."""
    if not Path(name).is_dir():
        return None
    size = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
    return (len(tensor_names(name, revision=revision, token=token)), size) if size else None


def find_file(name: str, file: str, *, revision: str | None, token: str | bool | None) -> Path | None:
    """Return the local path of a file of a folder or hub repository, or None if it is not there."""
    look_for(name)
    try:
        path = cached_file(name, file, revision=revision, token=token, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise CheckpointError(f"model: {name!r} could not be loaded: {error}") from error
    return None if path is None else Path(path)
