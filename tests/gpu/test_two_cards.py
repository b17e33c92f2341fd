"""Two processes with NCCL on two cards train what one card trains on the joined batch."""

import pytest
import torch

from training.test_ranks_train import CASES, alone, are_the_same, on_two_ranks

SYNCHRONISED = [name for name in CASES if not name.startswith("not")]
EVERY_DAY = ("memory",)
"""Checked on the CPU against itself, over gloo; all cases of the CPU are in tests/training."""


@pytest.fixture
def cases(device):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"two cards are needed, torch sees {torch.cuda.device_count()}")
    names = SYNCHRONISED if device.type == "cuda" else EVERY_DAY
    return {name: {**CASES[name], "device": device.type} for name in names}


def test_two_cards_train_the_joined_batch(cases, tmp_path):
    found = on_two_ranks(list(cases.values()), tmp_path)
    for options, (first, second) in zip(cases.values(), found, strict=True):
        are_the_same(first, second, alone(options, tmp_path))
