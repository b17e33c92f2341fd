"""Training: the arguments, the noise, the outer loss, and the Trainer that calls them."""

from memdlm.training.arguments import DiffusionConfig, TrainingArguments
from memdlm.training.outer import Batch, memory_of, noise_batch, prompt_only, score
from memdlm.training.trainer import MemDLMTrainer

__all__ = [
    "Batch",
    "DiffusionConfig",
    "MemDLMTrainer",
    "TrainingArguments",
    "memory_of",
    "noise_batch",
    "prompt_only",
    "score",
]
