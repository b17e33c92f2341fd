"""PEFT, imported only when there is an adapter: its import takes longer than all else in loading a model.

An object of PEFT can exist only after PEFT was imported, so the checks here need not import it to return False.
"""

import importlib
import sys
from typing import Any

from torch import nn


def peft() -> Any:
    """Return the package `peft`."""
    return importlib.import_module("peft")


def is_peft_model(model: nn.Module) -> bool:
    """Whether `model` is wrapped by PEFT."""
    return _is_a(model, "peft.peft_model", "PeftModel")


def is_lora_layer(module: nn.Module) -> bool:
    """Whether `module` is a linear layer with PEFT's LoRA around it."""
    return _is_a(module, "peft.tuners.lora.layer", "LoraLayer")


def _is_a(module: nn.Module, home: str, name: str) -> bool:
    # The name may be missing: another thread may be in the middle of the import.
    kind = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(module, kind)
