"""Changing what modules compute, for the length of a block and from outside."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]


@contextmanager
def patched(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let each module compute what it is mapped to; hooks, and wrappers around the module, still run."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(_restore, module, module.__dict__.get("forward"))
            module.forward = forward
        yield


def _restore(module: nn.Module, forward: Forward | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.forward = forward


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Let no block of `model` checkpoint itself (transformers' gradient checkpointing)."""
    blocks = [block for block in model.modules() if getattr(block, "gradient_checkpointing", False)]
    for block in blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep no activations inside `blocks`: the backward pass computes them again. Needs no training mode.

    Blocks that checkpoint themselves (transformers' gradient checkpointing, in training mode) are left alone.
    """
    idle = [block for block in blocks if not (block.training and getattr(block, "gradient_checkpointing", False))]
    with patched({block: partial(checkpoint, block.forward, use_reentrant=False) for block in idle}):
        yield
