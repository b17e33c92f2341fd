"""prompt -> text: generate, stream, infill, score."""

from memdlm.inference.config import PRESETS, GenerationConfig
from memdlm.inference.generate import Generation, filled, generate, infill, responses, run, stream
from memdlm.inference.job import Job, infill_job, prompt_cache_for, response_job
from memdlm.inference.prompt_cache import PromptCache
from memdlm.inference.prompts import Prompt, encode_prompts, special_ids
from memdlm.inference.scoring import score

__all__ = [
    "PRESETS",
    "Generation",
    "GenerationConfig",
    "Job",
    "Prompt",
    "PromptCache",
    "encode_prompts",
    "filled",
    "generate",
    "infill",
    "infill_job",
    "prompt_cache_for",
    "response_job",
    "responses",
    "run",
    "score",
    "special_ids",
    "stream",
]
