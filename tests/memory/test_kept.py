"""Files that earlier versions wrote are read, and mean what they meant."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import MASK, random_ids, rng, tiny

KEPT = Path(__file__).parents[1] / "kept"
FOLDERS = sorted(path.parent for path in KEPT.glob("*/*/model"))
FAMILIES = ("small", "lladamoe")
CONFIG = {"inner_rank": 2, "inner_alpha": 4.0, "inner_layer_fraction": 0.5, "strides": 2}


@torch.no_grad()
def readings(folder):
    """Logits of one text under the kept memory, and under what its learned start and rates write of another.

    In float64: a write amplifies the rounding of float32, which differs from CPU to CPU, to 2e-4.
    """
    kept = ParametricMemory(load_model(folder / "model", dtype="float32"), mask_token_id=MASK).load(folder / "memory")
    memory = ParametricMemory(load_model(folder / "model", dtype="float64"), mask_token_id=MASK)
    # The weights' digest is that of float32.
    saved = dataclasses.replace(kept, fingerprint=memory.unwritten().fingerprint)
    asked = random_ids(2, 6, seed=1)
    with memory.recall(saved):
        recalled = memory.model(asked).logits
    with memory.write(random_ids(2, 8, seed=2), generator=rng(3)):
        written = memory.model(asked).logits
    return {"plain": memory.model(asked).logits, "recalled": recalled, "written": written}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_an_earlier_version_kept_still_reads(folder):
    expected, found = load_file(folder / "expected.safetensors"), readings(folder)
    for name, logits in found.items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-8, atol=1e-10)
    # Neither the memory nor the learned write is idle in what was recorded.
    assert (expected["recalled"] - expected["plain"]).abs().max() > 1e-2
    assert (expected["written"] - expected["plain"]).abs().max() > 1e-2


def test_there_are_files_of_every_family_here():
    assert {path.name for path in FOLDERS} >= set(FAMILIES)


def keep(version):
    for family in FAMILIES:
        folder = KEPT / version / family
        folder.mkdir(parents=True)
        model = tiny(family)
        memory = ParametricMemory(model, MemoryConfig.recall(**CONFIG), mask_token_id=MASK)
        for tensor in memory.learned.parameters():
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=rng(5))
        model.save_pretrained(folder / "model")
        memory.learned.save(folder / "model")
        with memory.write(random_ids(1, 8), generator=rng(4)):
            memory.save(folder / "memory")
        save_file(readings(folder), folder / "expected.safetensors")


if __name__ == "__main__":
    keep(sys.argv[1])
