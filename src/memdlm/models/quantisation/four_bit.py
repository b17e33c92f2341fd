"""4-bit base models: quantised tensor by tensor while they are read, so the full-precision model is never held whole.

transformers quantises only linear layers, but our experts are stacked. So this module has its own quantiser, built on
transformers' interface. It quantises the experts and all linear layers of the blocks. Router, norms, embeddings, maps
of a condition and the vocabulary projection stay as they are.
"""

import importlib
import importlib.util
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from memdlm.errors import ConfigError
from memdlm.models.blocks.dit import Conditioning
from memdlm.models.blocks.experts import Experts
from memdlm.models.blocks.stacking import give_back

METHOD = "memdlm_nf4"
ROUTER = "gate"
"""The last part of a router's name in every family; its choices are too sensitive to be quantised."""
STACKS = ("gate_up_proj", "down_proj")
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)


def four_bit_config() -> "FourBitConfig":
    """Return what `from_pretrained(quantization_config=...)` needs. Raises ConfigError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "load_in_4bit needs bitsandbytes, which is not installed. Install it with: pip install 'memdlm[quant]' "
            "(or pip install bitsandbytes), or leave load_in_4bit off."
        )
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(FourBitConfig)
        register_quantizer(METHOD)(FourBitQuantizer)
    return FourBitConfig()


def is_four_bit(model: nn.Module) -> bool:
    """Whether `model` was loaded with `load_in_4bit`."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


class FourBitConfig(QuantizationConfigMixin):
    """nf4 with double quantisation, computed in the model's dtype; it has no options."""

    def __init__(self, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method


class FourBitQuantizer(HfQuantizer):
    """Replaces linear layers before loading, quantises tensors as they arrive, wraps expert stacks afterwards."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the tensor that goes to `param_name` is to be quantised."""
        path, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            return leaf in STACKS
        return isinstance(module, _layers().Linear4bit) and leaf == "weight"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if model.dtype not in COMPUTE:
            possible = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTE)
            raise ConfigError(
                f"load_in_4bit computes in {possible}, not in {str(model.dtype).removeprefix('torch.')}; "
                "choose one of these dtypes, or leave load_in_4bit off."
            )
        paths = linears_of_blocks(model)
        if not paths:
            raise ConfigError(
                f"load_in_4bit: {type(model).__name__} has no linear layers in numbered blocks to quantise."
            )
        for path in paths:
            old = model.get_submodule(path)
            model.set_submodule(path, _layers().Linear4bit(old, model.dtype))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, Experts):
                for name in STACKS:
                    packed = module._parameters.pop(name)
                    module.add_module(name, _layers().Stacked4bit(packed))
        model.is_loaded_in_4bit = True
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """Return the step that ends every conversion of a tensor to be quantised."""
        return _Quantise()

    def is_serializable(self) -> bool:
        """Return False: packed weights are not saved, since the checkpoint that they came from is there."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained on top."""
        return True


class _Quantise(ConversionOps):
    """Turn each arriving tensor into an nf4 parameter of its module."""

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any) -> dict[str, Any]:
        quantised = {}
        for name, arrived in input_dict.items():
            value: Tensor = arrived[0] if isinstance(arrived, list) else arrived
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            expected = getattr(module, leaf).shape
            # transformers does not compare the sizes of quantised tensors.
            if value.shape != expected:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)}")
            quantised[name] = _layers().quantise(value, module)
            give_back([value])
        return quantised


def linears_of_blocks(model: nn.Module) -> list[str]:
    """Return the paths of the linear layers inside the (numbered) blocks, without routers and maps of a condition."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, Conditioning)
        and re.search(r"\.\d+\.", path)
        and path.rpartition(".")[2] != ROUTER
    ]


def _layers() -> Any:
    return importlib.import_module("memdlm.models.quantisation.bnb_layers")
