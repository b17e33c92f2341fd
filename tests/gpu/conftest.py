"""The devices of these tests."""

from pathlib import Path

import pytest
import torch

ON_THE_CPU = "llada2"
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _exact_products():
    """Products of float32 numbers in float32: TF32 keeps 10 bits of a factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def pytest_collection_modifyitems(items):
    """Against itself the CPU checks the tests, not the networks: one family is enough for every day.

    Two processes train together in tests/training every day.
    """
    for item in (item for item in items if Path(__file__).parent in item.path.parents):
        parameters = item.callspec.params if isinstance(item, pytest.Function) and "callspec" in vars(item) else {}
        is_other = parameters.get("family", ON_THE_CPU) != ON_THE_CPU or item.path.name == "test_two_cards.py"
        if parameters.get("device") == "cpu" and is_other:
            item.add_marker(pytest.mark.slow)
