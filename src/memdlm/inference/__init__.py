"""prompt -> text: generate, stream, infill, score."""

from memdlm.inference.config import PRESETS, GenerationConfig
from memdlm.inference.generate import Generation, filled, generate, infill, responses, run, stream
from memdlm.inference.job import Job, infill_job, response_job
from memdlm.inference.prompts import Prompt, encode_prompts, special_ids
from memdlm.inference.scoring import score

__all__ = [
    "PRESETS",
    "Generation",
    "GenerationConfig",
    "Job",
    "Prompt",
    "encode_prompts",
    "filled",
    "generate",
    "infill",
    "infill_job",
    "response_job",
    "responses",
    "run",
    "score",
    "special_ids",
    "stream",
]
