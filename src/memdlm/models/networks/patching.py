"""Change what modules compute, from outside, inside a `with` block, and in one thread."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memdlm.models.blocks.looped import ABSENT

Forward = Callable[..., Any]


def in_this_thread() -> Callable[[], bool]:
    """Return a function that says whether it is called in the present thread, or in a backward pass.

    On CUDA, autograd runs layers again on its own threads, which Python did not start. A backward pass that runs in
    another Python thread does not count.
    """
    owner = threading.get_ident()

    def is_mine() -> bool:
        here = threading.get_ident()
        return here == owner or (torch._C._current_graph_task_id() != -1 and not _was_started_by_python(here))

    return is_mine


def _was_started_by_python(ident: int) -> bool:
    return any(
        thread.ident == ident and not isinstance(thread, threading._DummyThread) for thread in threading.enumerate()
    )


@contextmanager
def patched(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let each module compute what it is mapped to; hooks, and wrappers around the module, still run.

    In other threads the modules compute what they did before.
    """
    is_mine = in_this_thread()
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(_restore, module, module.__dict__.get("forward"))
            module.forward = partial(_either, is_mine, forward, module.forward)
        yield


def _either(is_mine: Callable[[], bool], forward: Forward, own: Forward, *args: Any, **kwargs: Any) -> Any:
    return (forward if is_mine() else own)(*args, **kwargs)


def _restore(module: nn.Module, forward: Forward | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.forward = forward


@contextmanager
def copied_bare(network: nn.Module, changed: Mapping[nn.Module, Mapping[str, Any]], hooks: set[int]) -> Iterator[None]:
    """Inside the block, let copies and pickles of `network` and its parts be as they are without the block.

    `changed` are the modules to which something was attached, with the attributes that they had before (`ABSENT`: none
    of that name); `hooks` are the ids of the hooks' handles. A shallow copy of `network` gets its own modules around
    the same tensors.
    """

    def state_of(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        bare = {name: _without(value, hooks) if "hooks" in name else value for name, value in state.items()}
        del bare["__reduce_ex__"]
        bare |= changed.get(module, {})
        if module is network:
            bare["_modules"] = _twins(module, changed, {})
        return {name: value for name, value in bare.items() if value is not ABSENT}

    def reduced(module: nn.Module, protocol: int) -> tuple[Any, ...]:
        parts: Any = type(module).__reduce_ex__(module, protocol)
        make, arguments, state, *rest = parts
        return (make, arguments, state_of(module, state), *rest)

    with ExitStack() as stack:
        for module in {network: None, **dict.fromkeys(changed)}:
            stack.callback(module.__dict__.pop, "__reduce_ex__", None)
            # copy, deepcopy and pickle all ask the object before its class.
            module.__dict__["__reduce_ex__"] = partial(reduced, module)
        yield


def _without(hooks: Any, ids: set[int]) -> Any:
    if not isinstance(hooks, OrderedDict):
        return hooks
    return OrderedDict((key, hook) for key, hook in hooks.items() if key not in ids)


def _twins(module: nn.Module, changed: Mapping[nn.Module, Any], known: dict[nn.Module, nn.Module]) -> dict[str, Any]:
    """Return the children of `module`; those with a changed module inside are shallow copies."""
    children: dict[str, Any] = {}
    for name, child in module._modules.items():
        if child is not None and any(part in changed for part in child.modules()):
            if child not in known:
                known[child] = copy.copy(child)
                known[child].__dict__["_modules"] = _twins(child, changed, known)
            child = known[child]
        children[name] = child
    return children


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Switch transformers' gradient checkpointing off in all blocks of `model`."""
    blocks = [block for block in model.modules() if getattr(block, "gradient_checkpointing", False)]
    for block in blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep no activations inside `blocks`: the backward pass computes them again. Works in evaluation mode too.

    Blocks that checkpoint themselves (transformers' gradient checkpointing, in training mode) are left alone.
    """
    idle = [block for block in blocks if not (block.training and getattr(block, "gradient_checkpointing", False))]
    with patched({block: partial(checkpoint, block.forward, use_reentrant=False) for block in idle}):
        yield
