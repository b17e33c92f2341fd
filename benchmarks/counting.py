"""How many operations a call does: matrix products, grouped ones too, and attention."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def grouped_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Operations of a grouped product: every row, or every column, of the first factor meets one matrix."""
    return 2 * math.prod(a) * b[-1]


def flops(call: Callable[[], Any]) -> int:
    """Operations of matrix products (grouped ones too) and attention."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
    with counter:
        call()
    return counter.get_total_flops()
