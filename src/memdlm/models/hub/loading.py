"""From a folder or hub name to a model that is ready to use."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from memdlm.errors import CheckpointError, ConfigError, MemDLMError, unknown
from memdlm.models.blocks.published import config_class_of_tensors
from memdlm.models.hub.devices import AUTO, check_device, choose_device, choose_dtype, computes_in, job_line, name_of
from memdlm.models.hub.families import FAMILIES, Family, family_of, register
from memdlm.models.hub.new_head import SEED, settle_new_head
from memdlm.models.hub.plausible import check_sizes
from memdlm.models.hub.resolution import (
    DAMAGE,
    SINGLE,
    published_dtype,
    resolve_config,
    tensor_count,
    tensor_names,
)
from memdlm.models.lora.adapters import adapter_config
from memdlm.models.lora.files import (
    WEIGHTS_FILE,
    base_of_adapter,
    is_adapter,
    load_outer_adapter,
    reload_outer_adapter,
)
from memdlm.models.lora.peft_on_demand import is_peft_model, peft
from memdlm.models.lora.wrappers import unwrap, unwrap_parallel
from memdlm.models.networks.checking import check_kind, check_name
from memdlm.models.quantisation.four_bit import four_bit_config, is_four_bit

MEMORY_FILE, MEMORY_CONFIG_FILE = "memory_init.safetensors", "memory_init.json"
"""Files that a training run with a learned memory adds to the model: its start, rates and gate; its options."""

SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"
"""The environment variable that keeps transformers from reading weights in threads."""

HEADLESS = (
    " If this is an encoder without a head, tie_head=True (memdlm convert --tie_head) puts a new one on it, tied to "
    "its embeddings and untrained."
)
CONVERTIBLE = ("qwen2", "qwen3", "llama")
CONVERSION = " If not, `memdlm convert` makes an A2D model of it, which training then teaches to fill masks."

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
    load_in_4bit: bool = False,
    adapter: str | Path | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    tie_head: bool = False,
) -> PreTrainedModel:
    """Load a masked diffusion language model, in eval mode.

    `name_or_path` is a folder or a hub name (at `revision`, with `token`; the hub's cache and offline mode are
    respected). The family is read off the files. A model of no family of ours loads through AutoModelForMaskedLM or,
    if its configuration says `is_causal: false`, as a converted decoder.

    `dtype` "auto" is the checkpoint's if `device` computes in it, else float32 (the log says so); CUDA cards before
    capability 8.0, for example, do not compute in bfloat16. `device` None means the CPU. "auto" means a CUDA card if
    there is one (in a distributed launch, this process's own), else Apple's MPS if all that is needed runs on it, else
    the CPU (see `choose_device`). Weights are read straight onto the device.

    `load_in_4bit` quantises the blocks' linear layers and experts (nf4) while reading, and computes in `dtype`.
    `adapter` is a folder or hub name with an outer LoRA. It is put on top and is trainable; everything else is frozen.
    When `name_or_path` itself is an adapter, the base is the one that it names.

    `tie_head` gives an encoder without a head a new one, tied to its embeddings and untrained (the log says so).

    When the folder (or the adapter's) holds a learned memory, the model's `memory_folder` names it, and a
    `ParametricMemory` starts from it.

    Raises CheckpointError when the folder is missing or damaged, the family is unknown, or any tensor is missing,
    unexpected or of the wrong size; ConfigError for a head that is there already, for an unknown dtype, for 4 bits in
    float64 or without bitsandbytes, and for a name that is not a device's; MachineError for a device that this machine
    does not have.
    """
    for what, value in (("name_or_path", name_or_path), ("adapter", adapter)):
        if value is not None or what == "name_or_path":
            check_name(value, what)
    _check_arguments(device, load_in_4bit, attn_implementation, revision)
    if device is not None and device != AUTO:
        check_device(device)
    if adapter is None and is_adapter(name_or_path, token=token):
        name_or_path, adapter = base_of_adapter(name_or_path, token=token), name_or_path
    name = str(name_or_path)
    arguments: dict[str, Any] = {"dtype": _dtype(dtype), "revision": revision, "token": token}
    family, config = resolve_config(name, revision=revision, token=token)
    check_sizes(config, name, tensor_count(name, revision=revision, token=token))
    if device is not None:
        published = published_dtype(name, config, revision=revision, token=token)
        arguments |= _placed(device, arguments["dtype"], published, load_in_4bit=load_in_4bit)
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if load_in_4bit:
        arguments["quantization_config"] = four_bit_config()
    loader = _foreign_loader(name, config) if family is None else family.lm_class
    with torch.random.fork_rng(devices=[], enabled=tie_head):
        if tie_head:
            torch.manual_seed(SEED)
        model, info = _read(loader, name, config, arguments)
    info = settle_new_head(model, info, name) if tie_head else info
    # Files of foreign models often hold heads of other tasks; transformers reports those.
    _check_tensors(name, family, info, revision, token, allow_others=family is None)
    if family is not None:
        model.check_loaded(name)
    model = (model if adapter is None else load_outer_adapter(model, adapter, token=token)).eval()
    model.memory_folder = _memory_folder(name if adapter is None else str(adapter))
    return model


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fill `model` in place from `folder`, which holds the saved model, or its saved outer adapter.

    The tensors are read as `load_model` reads them, and all are checked before the first is changed. The model may be
    wrapped for data parallelism and by torch.compile. It keeps its dtypes.

    Raises CheckpointError when files are missing or damaged, or any tensor is missing, unexpected or of the wrong size.
    """
    network = unwrap_parallel(model)
    if adapter_config(network) is not None:
        reload_outer_adapter(network, folder)
        return
    is_wrapped = is_peft_model(network)
    own = peft().get_peft_model_state_dict(network) if is_wrapped else network.state_dict()
    if isinstance(network, PreTrainedModel):
        found = _read_again(network, own, str(folder))
    else:
        found = _read_alone(Path(folder) / (WEIGHTS_FILE if is_wrapped else SINGLE), own)
    for name, tensor in own.items():
        tensor.copy_(found[name])


def _read_again(network: PreTrainedModel, own: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Read the model in folder `name`, in a dtype that holds every value of `own` exactly."""
    register()
    if not Path(name).is_dir():
        raise CheckpointError(f"model: the folder {name!r} does not exist.")
    family = family_of(network.config)
    for dtype in (network.dtype, torch.float32, torch.float64):
        model, info = _read(type(network), name, network.config, {"dtype": dtype})
        # Files that a training run wrote hold this model and nothing else, whatever its family.
        _check_tensors(name, family, info, None, None, allow_others=False)
        found: dict[str, Tensor] = model.state_dict()
        # A dtype that is narrower than one of several in the model would lose bits.
        if all(torch.promote_types(found[key].dtype, tensor.dtype) == found[key].dtype for key, tensor in own.items()):
            break
    return found


def _read_alone(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a file whose tensors have the names of `own`."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: the weights could not be read: {error}") from error
    shared = own.keys() & found.keys()
    info = {
        "missing_keys": own.keys() - found.keys(),
        "unexpected_keys": found.keys() - own.keys(),
        "mismatched_keys": [
            (key, found[key].shape, own[key].shape) for key in shared if found[key].shape != own[key].shape
        ],
    }
    _check_tensors(str(path), None, info, None, None, allow_others=False)
    return found


def _placed(
    device: str | torch.device, dtype: str | torch.dtype, published: torch.dtype | None, *, load_in_4bit: bool
) -> dict[str, Any]:
    """Return the arguments that put weights on `device`, in a dtype in which it computes."""
    wanted = dtype if isinstance(dtype, torch.dtype) else published
    place = choose_device(device, dtype=wanted or torch.float32, load_in_4bit=load_in_4bit)
    if device == AUTO and place.type == "cpu":
        return {}  # weights go there by default
    found: dict[str, Any] = {"device_map": {"": place}}
    if not isinstance(dtype, torch.dtype) and published is not None and not computes_in(place, published):
        found["dtype"] = choose_dtype(published, place)
    return found


def dtype_on(
    name_or_path: str | Path,
    dtype: str | torch.dtype,
    device: torch.device,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str | torch.dtype:
    """Return the dtype of weights that are loaded with `dtype` to compute on `device`, wherever they are loaded first.

    It is "auto" if only reading the weights can tell.

    Raises CheckpointError and ConfigError as `load_model` does.
    """
    wanted = _dtype(dtype)
    if isinstance(wanted, torch.dtype):
        return wanted
    name = str(name_or_path)
    if is_adapter(name, token=token):
        name = base_of_adapter(name, token=token)
    _, config = resolve_config(name, revision=revision, token=token)
    published = published_dtype(name, config, revision=revision, token=token)
    return AUTO if published is None else choose_dtype(published, device)


def base_dtype(name_or_path: str | Path, revision: str | None = None, token: str | bool | None = None) -> str:
    """Return the name of the dtype in which a model is published, on any device; "auto" as in `dtype_on`."""
    found = dtype_on(name_or_path, AUTO, torch.device("cpu"), revision, token)
    return found if isinstance(found, str) else name_of(found)


def line_of(model: nn.Module) -> str:
    """Return the first line of a job with `model`: its device, dtype and attention implementation."""
    network = unwrap(model)
    first = next(network.parameters())
    dtype = network.dtype if isinstance(network, PreTrainedModel) else first.dtype
    return job_line(first.device, dtype, attention_of(network), is_quantised=is_four_bit(network))


def attention_of(network: nn.Module) -> str | None:
    """Return the name of a network's attention implementation, or None if it has no choice of them."""
    found: str | None = getattr(getattr(network, "config", None), "_attn_implementation", None)
    return found


def _check_arguments(device: Any, load_in_4bit: Any, attn_implementation: Any, revision: Any) -> None:
    """Raise ConfigError for an argument of the wrong type."""
    check_kind(load_in_4bit, bool, "load_in_4bit", "True or False")
    check_kind(device, (str, torch.device, type(None)), "device", "auto, a device's name, such as cuda, or None")
    for name, value in (("attn_implementation", attn_implementation), ("revision", revision)):
        check_kind(value, (str, type(None)), name, "a name, or None")


def _memory_folder(name: str) -> str | None:
    return name if (Path(name) / MEMORY_FILE).is_file() else None


def model_skeleton(
    name_or_path: str | Path, revision: str | None = None, token: str | bool | None = None
) -> PreTrainedModel:
    """Return the model that `load_model` would load, without weights and adapters, on the meta device."""
    name = (
        str(name_or_path) if not is_adapter(name_or_path, token=token) else base_of_adapter(name_or_path, token=token)
    )
    family, config = resolve_config(name, revision=revision, token=token)
    # The meta device holds no numbers, so only sizes that no model has are refused.
    check_sizes(config, name, None)
    try:
        with torch.device("meta"):
            return _foreign_loader(name, config).from_config(config) if family is None else family.lm_class(config)
    except MemDLMError:
        raise
    except DAMAGE as error:
        raise CheckpointError(f"model: no network fits the configuration of {name!r}: {error}") from error


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


def cast_parameters(model: PreTrainedModel, dtype: str | torch.dtype) -> None:
    """Round all parameters to `dtype` ("auto": leave them), in place; buffers, such as router biases, keep theirs."""
    wanted = _dtype(dtype)
    if isinstance(wanted, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(wanted)


def _read(loader: Any, name: str, config: PreTrainedConfig, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        with _tensor_by_tensor():
            # Wrong sizes are returned too, so that one message lists all problems.
            return loader.from_pretrained(
                name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            )
    except MemDLMError:
        raise
    # A damaged index raises AttributeError.
    except (*DAMAGE, AttributeError) as error:
        raise CheckpointError(f"{_damaged_file(name)}: the weights could not be read: {error}") from error


@contextmanager
def _tensor_by_tensor() -> Iterator[None]:
    """Let transformers read a tensor, or the experts of a layer, when its turn comes.

    By default its threads read, convert and move tensors ahead, while the stacks that are made of them are there too:
    a second copy of most of the model, on the device as well. transformers has no argument for this, only an
    environment variable.
    """
    earlier = os.environ.get(SYNCHRONOUS)
    os.environ[SYNCHRONOUS] = "1"
    try:
        yield
    finally:
        if earlier is None:
            os.environ.pop(SYNCHRONOUS, None)
        else:
            os.environ[SYNCHRONOUS] = earlier


def _damaged_file(name: str) -> Path | str:
    """Return the first weight file in folder `name` that is damaged, or `name` itself if none is."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return name


def _check_tensors(
    name: str,
    family: Family | None,
    info: Mapping[str, Any],
    revision: str | None,
    token: str | bool | None,
    *,
    allow_others: bool,
) -> None:
    """Refuse a model with weights that the files did not set, and, unless allowed, files with other weights too."""
    problems = {kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected")}
    problems["of the wrong size"] = sorted(
        f"{key} {tuple(found)} instead of {tuple(expected)}" for key, found, expected in info["mismatched_keys"]
    )
    if allow_others:
        problems.pop("unexpected")
    if not any(problems.values()):
        return
    words = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
    if family is None:
        way_out = HEADLESS if [kind for kind, names in problems.items() if names] == ["missing"] else ""
        raise CheckpointError(f"{name}: tensors do not match the configuration. {words}.{way_out}")
    hint = ""
    told = config_class_of_tensors(tensor_names(name, revision=revision, token=token))
    for other in FAMILIES:
        if other is not family and other.config_class is told:
            hint = f" The tensor names look like {other.name}: correct `architectures` in config.json."
    raise CheckpointError(f"{name}: tensors do not match the {family.name} family. {words}.{hint}")


def _foreign_loader(name: str, config: PreTrainedConfig) -> Any:
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        if getattr(config, "is_causal", True) is False:
            return AutoModelForCausalLM
        raise CheckpointError(
            f"model {name!r}: {config.model_type} is autoregressive. If this checkpoint was converted to look both "
            'ways, say so in its config.json with "is_causal": false.'
            f"{CONVERSION if config.model_type in CONVERTIBLE else ''}"
        )
    raise CheckpointError(
        f"model {name!r}: {config.model_type} has no token prediction for every position. Possible: "
        f"{', '.join(family.name for family in FAMILIES)}, or any masked language model of transformers."
    )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(unknown("dtype:", dtype, ["auto", *DTYPES]))
    return DTYPES[dtype]
