"""Shared fixtures. Tests run on one thread per process: the models are tiny, and workers run side by side."""

import gc
import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Commands that tests start are as small, and would spin beside each other on more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
import shape_checks

# Shapes are checked here and cost nothing elsewhere. Before the package is imported.
install_import_hook(shape_checks.modules(), "shape_checks.of_tensors")


def pytest_collection_finish():
    """Spare the garbage collector what was imported: transformers' Trainer collects at every start, over all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _checks_are_no_callers():
    """Whoever opened a block is named by file and line, and not by the checks in between."""
    from memdlm.memory import open_block

    open_block.PASSED_BY = (*open_block.PASSED_BY, "jaxtyping")


@pytest.fixture(autouse=True)
def _shapes(request):
    """Leave a test alone that passes wrong shapes on purpose."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("no_shape_checks") is not None)


@pytest.fixture
def word_tokenizer():
    """The package's own word tokenizer, with its mask token."""
    from memdlm.data.tokenizer import build_word_tokenizer

    return build_word_tokenizer(f"w{index}" for index in range(20))


@pytest.fixture
def machine(monkeypatch):
    """Return a function that answers what the rule behind "auto" asks as another machine would.

    `machine(cuda=8, capability=(7, 5), mps=False, LOCAL_RANK="3")`; at first there is a CPU alone.
    """
    from memdlm.models.hub import devices

    def forget():
        devices.mps_problem.cache_clear()
        devices._say_once.cache_clear()

    def put(cuda=0, capability=(9, 0), mps=False, **environment):
        forget()
        for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(devices, "cuda_is_there", lambda: cuda > 0)
        monkeypatch.setattr(devices, "cuda_count", lambda: cuda)
        monkeypatch.setattr(devices, "cuda_capability", lambda device: capability)
        monkeypatch.setattr(devices, "mps_is_there", lambda: mps)
        if cuda:
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")

    put()
    yield put
    forget()
