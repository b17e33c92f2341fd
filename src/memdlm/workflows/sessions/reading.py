"""Saved memories that a session reads: found, checked, and opened in its model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import final

from torch import nn
from transformers import PreTrainedTokenizerBase

from memdlm.errors import ConfigError
from memdlm.files import resolved
from memdlm.memory import MemoryConfig, ParametricMemory, SavedMemory, read_memory
from memdlm.memory.files.library import find_memories, find_memory
from memdlm.workflows.sessions.decoding import DecodingOptions


@final
@dataclass(frozen=True, slots=True)
class Reader:
    """One saved memory, and what opens it in a model."""

    path: str
    saved: SavedMemory
    memory: ParametricMemory

    def opened(self) -> AbstractContextManager[SavedMemory]:
        """Let every call of the model read it inside the block."""
        return self.memory.recall(self.saved)


def saved_memories(paths: Sequence[str]) -> dict[str, SavedMemory]:
    """Read the memories at `paths`, by path; a folder of memories stands for all of them.

    Raises MemoryFileError for one that is not there or damaged, ConfigError for one that is named twice.
    """
    found: dict[str, SavedMemory] = {}
    places = set()
    for path in paths:
        for each in find_memories(path):
            if resolved(each) in places:
                raise ConfigError(f"memory: {str(each)!r} is named twice. Leave one out.")
            places.add(resolved(each))
            found[str(each)] = read_memory(each)
    return found


def readers_of(memories: dict[str, SavedMemory], model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Reader]:
    """Return what reads `memories` in `model`; raises MemoryFileError for one that was written for another."""
    # One per set of options: each takes the fingerprint of the whole model.
    known: dict[MemoryConfig, ParametricMemory] = {}
    readers = []
    for path, saved in memories.items():
        config = saved.reading_config
        if config not in known:
            known[config] = ParametricMemory(model, config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
        known[config].check_fits(saved, f"memory {path!r}")
        readers.append(Reader(path, saved, known[config]))
    return readers


def saved_memory(options: DecodingOptions) -> dict[str, SavedMemory]:
    """Read the memory that `options` name; empty: none."""
    return {} if options.memory is None else saved_memories([str(find_memory(options.memory))])


def opened(readers: Sequence[Reader]) -> AbstractContextManager[object]:
    """Open the only one of `readers`, if there is one."""
    return readers[0].opened() if readers else nullcontext()
