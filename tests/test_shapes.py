"""The shapes that signatures state are checked in tests, and cost nothing elsewhere."""

import subprocess
import sys

import jaxtyping
import pytest
import torch

from memdlm.diffusion.masking import corrupt, positions_of
from memdlm.diffusion.schedules import Linear

IDS, SET = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)


def noised(ids=IDS, is_maskable=SET, times=2):
    t = torch.full((times,), 0.5)
    return corrupt(ids, is_maskable, t, torch.rand(2, 3), schedule=Linear(), mask_token_id=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: positions_of(SET[0]),
        lambda: noised(is_maskable=SET[:, :2]),
        lambda: noised(ids=IDS.float()),
        lambda: noised(times=3),
    ],
    ids=["a set of one text", "a set of other columns", "ids that are no integers", "times of other texts"],
)
def test_a_wrong_shape_is_noticed(call):
    assert noised().ids.shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


@pytest.mark.no_shape_checks
def test_a_marked_test_is_left_alone():
    assert positions_of(SET[0]).tolist() == [0, 1, 2]


def test_elsewhere_nothing_is_wrapped():
    command = "from memdlm.diffusion import masking; print(hasattr(masking.positions_of, '__wrapped__'))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert hasattr(positions_of, "__wrapped__")
