"""prompt -> text: generate, stream, infill, score."""

from memdlm.inference.config import PRESETS, GenerationConfig
from memdlm.inference.decoder import Decoder, Generation, Job
from memdlm.inference.generate import generate, infill, stream
from memdlm.inference.prompt_cache import PromptCache
from memdlm.inference.prompts import Prompt, encode_prompts, special_ids
from memdlm.inference.scoring import score

__all__ = [
    "PRESETS",
    "Decoder",
    "Generation",
    "GenerationConfig",
    "Job",
    "Prompt",
    "PromptCache",
    "encode_prompts",
    "generate",
    "infill",
    "score",
    "special_ids",
    "stream",
]
