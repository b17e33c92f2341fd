"""What an inner loop writes into fast weights, and how a model reads it back."""

from memdlm.memory.adapters import ADAPTERS, Adapter, Full, LoRA
from memdlm.memory.config import FastWeightsConfig, MemoryConfig, OuterConfig, WriteConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.files.combining import average, compress, concatenate
from memdlm.memory.files.library import rename_memory
from memdlm.memory.files.saved import (
    MemorySummary,
    SavedMemory,
    delete_memory,
    inspect_memory,
    is_memory,
    list_memories,
    read_memory,
)
from memdlm.memory.inner_loop import InnerLoss, LocalSGD, Written, run_inner_loop
from memdlm.memory.objectives import OBJECTIVES, Objective
from memdlm.memory.parametric import ParametricMemory
from memdlm.memory.sites import Site, find_sites
from memdlm.memory.trajectory import STRATEGIES, Anchor, Strategy, TrajectoryStep, trajectory

__all__ = [
    "ADAPTERS",
    "OBJECTIVES",
    "STRATEGIES",
    "Adapter",
    "Anchor",
    "FastWeights",
    "FastWeightsConfig",
    "Full",
    "InnerLoss",
    "LoRA",
    "LocalSGD",
    "MemoryConfig",
    "MemorySummary",
    "Objective",
    "OuterConfig",
    "ParametricMemory",
    "SavedMemory",
    "Site",
    "Strategy",
    "TrajectoryStep",
    "WriteConfig",
    "Written",
    "average",
    "compress",
    "concatenate",
    "delete_memory",
    "find_sites",
    "inspect_memory",
    "is_memory",
    "list_memories",
    "read_memory",
    "rename_memory",
    "run_inner_loop",
    "trajectory",
]
