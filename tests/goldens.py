"""Recordings of the published code (MemDLM f6667e6 on dLLM 0dec970a), enumerated from the folder in MEMDLM_GOLDEN.

Any subset of files may be present in a family's folder; whatever is present is replayed, and fails if it cannot be.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from memdlm.models import load_model

ROOT = Path(os.environ.get("MEMDLM_GOLDEN", Path(__file__).parent / "golden"))


def folders(file: str) -> list[str]:
    """Family folders that hold `file`."""
    return sorted(each.parent.name for each in ROOT.glob(f"*/{file}"))


@dataclass(frozen=True)
class Case:
    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family}/{self.name}"

    @property
    def record(self) -> dict:
        return read_json(self.family, KIND_FILES[self.name.split(":")[0]])[self.name.split(":", 1)[1]]


KIND_FILES = {"adapt": "adapt.json", "outer": "outer.json", "sampler": "sampler.json"}


def cases(kind: str) -> list[Case]:
    """Every recorded case of a kind, over all families."""
    file = KIND_FILES[kind]
    return [Case(family, f"{kind}:{name}") for family in folders(file) for name in read_json(family, file)]


@lru_cache
def read_json(family: str, file: str) -> dict:
    return json.loads((ROOT / family / file).read_text())


@lru_cache
def tensors(family: str, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, ids and indices as int64 and 0/1 masks as bool; empty if there is no such file."""
    path = ROOT / family / file
    if not path.exists():
        return {}
    return {
        name: value.bool() if value.dtype == torch.uint8 else value if value.is_floating_point() else value.long()
        for name, value in load_file(path).items()
    }


@lru_cache
def model(family: str):
    """The recorded network, float32, eval mode. Shared: tests must leave it as it was."""
    return load_model(ROOT / family / "checkpoint", dtype="float32")
