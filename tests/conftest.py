"""Shared fixtures. Tests run on one thread per process: the models are tiny, and workers run side by side."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

# Commands that tests start are as small, and would spin beside each other on more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_finish():
    """Spare the garbage collector what was imported: transformers' Trainer collects at every start, over all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def word_tokenizer():
    """The package's own word tokenizer, with its mask token."""
    from memdlm.data.tokenizer import build_word_tokenizer

    return build_word_tokenizer(f"w{index}" for index in range(20))
