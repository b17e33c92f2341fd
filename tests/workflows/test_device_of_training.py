"""Where a training process loads its weights."""

from types import SimpleNamespace

import pytest
import torch

from memdlm.workflows.train import device_of


def arguments(device="cuda:1", **given):
    return SimpleNamespace(**{"fsdp": [], "deepspeed": None, "device": torch.device(device), **given})


@pytest.fixture(autouse=True)
def _plain_launch(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


def test_every_process_loads_on_its_own_device():
    assert device_of(arguments()) == torch.device("cuda:1")
    assert device_of(arguments("cpu")) is None


@pytest.mark.parametrize("given", [{"fsdp": ["full_shard"]}, {"deepspeed": "zero.json"}])
def test_weights_that_will_be_sharded_are_loaded_on_the_cpu(given):
    assert device_of(arguments(**given)) is None


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_says_that_weights_will_be_sharded(name, monkeypatch):
    monkeypatch.setenv(name, "true")
    assert device_of(arguments()) is None
    monkeypatch.setenv(name, "false")
    assert device_of(arguments()) == torch.device("cuda:1")
