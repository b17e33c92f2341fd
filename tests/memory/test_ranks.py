"""Two processes write the memory, and compute the outer gradients, that one process has for the joined batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig
from rank_worker import run

WORKER = Path(__file__).parents[1] / "rank_worker.py"


ACCUMULATED = {"chunk_length": 6, "chunk_overlap": 1, "chunk_update": "accumulated"}
SEQUENTIAL = {"chunk_length": 6}
"""Trimmed, the first rank has three chunks and the second one two; so they have of ACCUMULATED without an overlap."""
VIEWS = {"masking_strategy": "strided", "strides": 3, "num_inner_steps": 2}
"""Two views of each text in one step, and one in the other."""
CASES = {
    "experts-ddp": {"family": "lladamoe", "wrapper": "ddp", "norm": "token"},
    "experts-ddp-checkpointing": {"family": "lladamoe", "wrapper": "ddp", "norm": "sequence", "checkpointing": True},
    "dense-ddp-teacher": {"family": "small", "wrapper": "ddp", "norm": "batch", "objective": "distill"},
    "experts-ddp-sampled": {"family": "lladamoe", "wrapper": "ddp", "norm": "token", "fraction": 0.5},
    "experts-ddp-accumulated": {"family": "lladamoe", "wrapper": "ddp", "norm": "sequence", "memory": ACCUMULATED},
    "dense-ddp-accumulated-sampled": {"family": "small", "wrapper": "ddp", "fraction": 0.5, "memory": ACCUMULATED},
    "dense-ddp-sequential": {"family": "small", "wrapper": "ddp", "trimmed": True, "memory": SEQUENTIAL},
    "experts-fsdp-sequential": {"family": "lladamoe", "wrapper": "fsdp", "trimmed": True, "memory": SEQUENTIAL},
    "dense-ddp-trimmed-accumulated": {
        **{"family": "small", "wrapper": "ddp", "trimmed": True},
        "memory": ACCUMULATED | {"chunk_overlap": 0},
    },
    "experts-fsdp-trimmed-accumulated": {
        **{"family": "lladamoe", "wrapper": "fsdp", "trimmed": True},
        "memory": ACCUMULATED | {"chunk_overlap": 0},
    },
    "dense-ddp-views": {"family": "small", "wrapper": "ddp", "norm": "batch", "memory": VIEWS},
    "experts-ddp-views": {"family": "lladamoe", "wrapper": "ddp", "norm": "sequence", "memory": VIEWS},
    "experts-fsdp": {"family": "lladamoe", "wrapper": "fsdp", "norm": "token"},
    "dense-fsdp-checkpointing": {"family": "small", "wrapper": "fsdp", "norm": "token", "checkpointing": True},
    "off-ddp": {"family": "small", "wrapper": "ddp", "sync": False},
    "off-fsdp": {"family": "small", "wrapper": "fsdp", "sync": False},
    **{
        f"off-{wrapper}-{update}": {
            **{"family": "small", "wrapper": wrapper, "sync": False, "trimmed": True},
            "memory": {"chunk_length": 6, "chunk_update": update},
        }
        for wrapper in ("ddp", "fsdp")
        for update in ("sequential", "accumulated")
    },
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Every case on both ranks of one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = json.dumps(list(CASES.values()))
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), "2", folder / "store", folder / "out", cases],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    found = [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]
    return {name: list(pair) for name, pair in zip(CASES, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("off")])
def test_all_ranks_hold_the_memory_of_the_joined_batch(name, two_ranks):
    first, second = two_ranks[name]
    alone = run({**CASES[name], "wrapper": ""}, slice(None))
    assert set(first) == set(alone)
    for key, value in alone.items():
        assert_close(first[key], value, rtol=1e-9, atol=1e-11, msg=key)
        assert_close(second[key], first[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("off")])
def test_without_synchronisation_ranks_write_their_own(name, two_ranks):
    for rank, found in enumerate(two_ranks[name]):
        alone = run({**CASES[name], "wrapper": ""}, slice(2 * rank, 2 * rank + 2))
        for key in (key for key in alone if key.startswith("fast/")):
            assert_close(found[key], alone[key], rtol=1e-9, atol=1e-11)
    first, second = two_ranks[name]
    assert not any(first[key].equal(second[key]) for key in first if key.endswith("lora_B"))


def test_synchronising_memories_that_rows_own_is_refused():
    with pytest.raises(ConfigError, match="mem_sync_inner=True has no effect with mem_per_sample=None"):
        MemoryConfig(sync_inner=True)
