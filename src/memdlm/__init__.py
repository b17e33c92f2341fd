"""Masked diffusion language models with parametric memory.

    model      = memdlm.load_model("path/or/hub-name")
    tokenizer  = memdlm.load_tokenizer("path/or/hub-name")
    memory     = memdlm.ParametricMemory(model, memdlm.MemoryConfig(), mask_token_id=tokenizer.mask_token_id)
    with memory.write(input_ids):
        ...                                # every call of the model reads what was written
    result     = memdlm.generate(model, tokenizer, ["a prompt"], memory=memory)

Names are loaded on first use, so `import memdlm` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from memdlm.version import __version__ as __version__

if TYPE_CHECKING:
    from memdlm.inference import Generation, GenerationConfig, generate, infill, score, stream
    from memdlm.memory import MemoryConfig, ParametricMemory
    from memdlm.models import BlockCausal, Full, build_model, load_model, load_tokenizer
    from memdlm.training import MemDLMTrainer, TrainingArguments

_HOMES = {
    "memdlm.models": ("BlockCausal", "Full", "build_model", "load_model", "load_tokenizer"),
    "memdlm.memory": ("MemoryConfig", "ParametricMemory"),
    "memdlm.inference": ("Generation", "GenerationConfig", "generate", "infill", "score", "stream"),
    "memdlm.training": ("MemDLMTrainer", "TrainingArguments"),
}

__all__ = [
    "BlockCausal",
    "Full",
    "Generation",
    "GenerationConfig",
    "MemDLMTrainer",
    "MemoryConfig",
    "ParametricMemory",
    "TrainingArguments",
    "build_model",
    "generate",
    "infill",
    "load_model",
    "load_tokenizer",
    "score",
    "stream",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'memdlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
