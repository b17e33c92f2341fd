"""prompt -> text: generate, stream, infill, score."""

from memdlm.inference.config import GenerationConfig
from memdlm.inference.generate import Generation, generate, infill, score, stream
from memdlm.inference.prompts import Prompt, encode_prompts, special_ids

__all__ = [
    "Generation",
    "GenerationConfig",
    "Prompt",
    "encode_prompts",
    "generate",
    "infill",
    "score",
    "special_ids",
    "stream",
]
