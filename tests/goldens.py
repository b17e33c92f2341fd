"""Recordings of the published code (MemDLM f6667e6 on dLLM 0dec970a), enumerated from the folder in MEMDLM_GOLDEN.

Any subset of files may be present in a family's folder; whatever is present is replayed, and fails if it cannot be.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memdlm.errors import CheckpointError
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
    """Every recorded case of a kind, over all families. What a file says beside its cases is no object."""
    file = KIND_FILES[kind]
    return [
        Case(family, f"{kind}:{name}")
        for family in folders(file)
        for name, record in read_json(family, file).items()
        if isinstance(record, dict)
    ]


def must_know(case: object, found: Iterable[str], known: Iterable[str], what: str = "field") -> None:
    """Fail unless a replay knows everything that was recorded: a field that it ignored might change the result."""
    unknown = sorted(set(found) - set(known))
    if unknown:
        cannot_replay(case, f"this replay knows no recorded {what} {', '.join(unknown)}")


def cannot_replay(case: object, reason: str) -> None:
    """Fail with one line: a case that cannot be replayed is neither skipped nor a crash."""
    pytest.fail(f"{case} cannot be replayed: {reason}", pytrace=False)


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


def model(family: str):
    """The recorded network, float32, eval mode. Shared: tests must leave it as it was."""
    try:
        return _model(ROOT / family / "checkpoint")
    except CheckpointError as error:
        config = read_json(family, "checkpoint/config.json")
        stated = f"{config.get('model_type')!r} {config.get('architectures')}"
        cannot_replay(family, f"its network, {stated}, is none of ours. {error}")


@lru_cache
def _model(folder: Path):
    return load_model(folder, dtype="float32")
