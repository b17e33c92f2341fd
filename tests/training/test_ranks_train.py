"""Two processes train what one trains on the joined batch; how a step is cut up changes nothing either."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rank_train_worker import train, train_sharded

WORKER = Path(__file__).parents[1] / "rank_train_worker.py"
CASES = {
    "plain": {"mem": False},
    "memory": {"stratified": True},
    "memory, sequence norm": {"norm": "sequence"},
    "memory per row": {"memory": {"per_sample": True}},
    "contexts of some rows": {
        "memory": {"write_source": "context", "per_sample": True, "outer_gradient": "exact", "learn_start": True},
        "contexts": True,
        "more": ["nll_memory", "nll_no_context", "inner_loss_1"],
    },
    "some steps in chunks": {"memory": {"per_sample": True, "chunk_length": 4, "chunk_share": 0.5}},
    "memory, fully_shard": {"wrapper": "fsdp"},
    "block diffusion, memory": {"family": "llada2", "block_size": 4, "stratified": True},
    "not synchronised": {"memory": {"sync_inner": False}},
    "not synchronised, fully_shard": {"wrapper": "fsdp", "sync": False},
}
ZERO2 = {
    "family": "small",
    "deepspeed": {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
    },
}


def alone(options, folder, **cut):
    if options.get("wrapper") == "fsdp":
        return train_sharded(options)
    return train({key: value for key, value in options.items() if key != "deepspeed"}, folder, **cut)


def on_two_ranks(cases, folder, **environment):
    run_two([WORKER, folder / "out", json.dumps(cases)], **environment)
    found = [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]
    return list(zip(*found, strict=True))


def run_two(command, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    found = on_two_ranks(list(CASES.values()), tmp_path_factory.mktemp("ranks"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("not")])
def test_two_ranks_train_the_joined_batch(name, two_ranks, tmp_path):
    first, second = two_ranks[name]
    are_the_same(first, second, alone(CASES[name], tmp_path))


def are_the_same(first, second, expected, rtol=1e-6, atol=1e-8):
    assert first.keys() == second.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(second[key], first[key], rtol=0, atol=0, msg=key)
        # Logged figures are rounded by the Trainer.
        close = {"rtol": rtol, "atol": atol} if key.startswith("weight/") else {"rtol": 1e-4, "atol": 1e-4}
        assert_close(first[key], value, msg=lambda text, key=key: f"{key}: {text}", **close)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("not")])
def test_without_synchronisation_the_result_is_another(name, two_ranks, tmp_path):
    first, second = two_ranks[name]
    joined = alone({**CASES[name], "memory": {}, "sync": True}, tmp_path)
    weights = [key for key in joined if key.startswith("weight/")]
    assert all(first[key].equal(second[key]) for key in weights)
    assert max((first[key] - joined[key]).abs().max().item() for key in weights) > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        CASES["plain"],
        CASES["memory per row"],
        {**CASES["some steps in chunks"], "family": "small"},
        {**CASES["contexts of some rows"], "family": "small"},
        {"mem": False, "stratified": True},
        {"mem": False, "family": "llada2", "block_size": 4},
    ],
    ids=str,
)
def test_accumulated_steps_are_the_whole_step(options, tmp_path):
    whole = alone(options, tmp_path)
    for pieces in (2, 4, 8):
        cut = alone(options, tmp_path, accumulation=pieces)
        for key in (key for key in whole if key.startswith("weight/")):
            assert_close(cut[key], whole[key], rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def test_a_memory_shared_by_a_micro_batch_depends_on_how_a_step_is_cut(tmp_path):
    whole, cut = alone({}, tmp_path), alone({}, tmp_path, accumulation=4)
    assert max((whole[key] - cut[key]).abs().max().item() for key in whole if key.startswith("weight/")) > 1e-4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero_2_trains_the_joined_batch(tmp_path):
    ((first, second),) = on_two_ranks([ZERO2], tmp_path, DS_ACCELERATOR="cpu")
    expected = alone(ZERO2, tmp_path)
    # DeepSpeed's own copy of the weights is float32, whatever the model's type.
    are_the_same(first, second, expected, rtol=1e-4, atol=1e-5)


def test_two_ranks_resume_alike_and_stop_together_when_one_diverges(tmp_path):
    run_two([WORKER.with_name("rank_guard_worker.py"), tmp_path])
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen-{rank}.json").read_text())
        assert seen["moved"]
        assert seen["resumed"]
        assert "training diverged: the loss at step 2 held NaN" in seen["message"]
        assert seen["steps"] == 2


GATHERING = """
import json, os, sys
import torch.distributed as dist
from memdlm.training.noise import _gathered, host_group
dist.init_process_group("gloo")
own = [[3, 4_000_000_000, 5], [7]][dist.get_rank()]
found = [_gathered(numbers, 2, host_group()) for numbers in (own, own[1:])]
open(f"{sys.argv[1]}/{dist.get_rank()}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_with_different_numbers_of_rows_know_each_other_s(tmp_path):
    run_two(["-c", GATHERING, tmp_path])
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [[[3, 4_000_000_000, 5], [7]], [[4_000_000_000, 5], []]]
