"""A device double: tensors that say they live on an accelerator, hold real values, and tell when they are waited for.

Every tensor on the double wraps a CPU tensor. Operations run on what is wrapped, so results are those of the CPU. What
a CPU run cannot show is checked here: an operation on tensors of two devices raises, so does a generator of another
device, and every operation for whose result the host would wait for a GPU is counted, with the function of ours that
asked.

The tensors say that they are on `meta`: torch has a device guard for it and starts no threads of its own, which its
`PrivateUse1` backend in Python would abort in.
"""

import collections
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import memdlm

NAME = DEVICE = "meta"
PACKAGE = f"{Path(memdlm.__file__).parent}/"
"""Where our code lies. Its name alone would not do: a folder above it may have the same."""

WAITING = {
    "aten::_local_scalar_dense": "item",
    "aten::equal": "equal",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
    "aten::is_nonzero": "bool",
}
"""Operations whose result, or its size, the host has to know."""


class OnDevice(torch.Tensor):
    """A tensor on the double."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(DEVICE),
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        """Copy to the host, as `tolist` of a GPU's tensor does."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on the device cannot be turned into numpy; copy it to the host first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Sees the operations that make tensors on the device from none there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NAME:
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


waits: "collections.Counter[tuple[str, str]]" = collections.Counter()
"""(kind of wait, file:line of ours) -> how often, since `counting` began."""


_generators: dict[int, "DeviceGenerator"] = {}
"""The double's generators by address: operations see torch's own view. Kept, so that no address comes twice."""


class DeviceGenerator(torch.Generator):
    """A generator of the double."""

    def __init__(self) -> None:
        super().__init__()
        _generators[self._cdata] = self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(DEVICE)


class _OfAnyDevice(type):
    real = torch.Generator

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.real)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return DeviceGenerator() if torch.device(device).type == NAME else cls.real(device)


class AnyGenerator(metaclass=_OfAnyDevice):
    """Stands in for `torch.Generator`."""


class _Literals(TorchFunctionMode):
    """Sees tensors made of Python numbers, which reach the device by a copy from the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == NAME:
            waits["copy to device", place()] += 1
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _patches() -> list[tuple[Any, str, Any]]:
    """What torch does not know of this device: its generators, and autocast."""
    is_on, dtype, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    return [
        (torch, "Generator", AnyGenerator),
        (torch, "autocast", lambda kind, **options: autocast("cpu" if kind == NAME else kind, **options)),
        (torch, "is_autocast_enabled", lambda kind="cpu": is_on("cpu" if kind == NAME else kind)),
        (torch, "get_autocast_dtype", lambda kind: dtype("cpu" if kind == NAME else kind)),
    ]


@contextmanager
def counting() -> Iterator["collections.Counter[tuple[str, str]]"]:
    """Run a block on the double; yields the waits as they are counted."""
    waits.clear()
    with ExitStack() as stack:
        for owner, name, patch in _patches():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, patch)
        stack.enter_context(Factories())
        stack.enter_context(_Literals())
        yield waits


def to_device(module: torch.nn.Module) -> torch.nn.Module:
    """Put all parameters and buffers of `module` on the double, in place; tied parameters stay tied."""
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in list(each._parameters.items()):
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = torch.nn.Parameter(OnDevice(parameter.data), parameter.requires_grad)
                each._parameters[name] = moved[parameter]
        for name, buffer in list(each._buffers.items()):
            if buffer is not None:
                each._buffers[name] = OnDevice(buffer)
    return module


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    found = list(_tensors((args, kwargs)))
    ours = [each for each in found if isinstance(each, OnDevice)]
    target = kwargs.get("device")
    _count(name, args, kwargs, bool(ours))
    if name not in ("aten::_to_copy", "aten::copy_"):
        _refuse_mixture(name, found, ours)
    generator = kwargs.get("generator")
    # What arrives here is torch's own view of a generator, which does not know of the double.
    if generator is not None and generator._cdata not in _generators:
        raise RuntimeError(f"{name}: expected a generator of the device {DEVICE}, got one of {generator.device}.")
    to_host = target is not None and torch.device(target).type != NAME
    made = func(
        *tree_map(_unwrap, args), **tree_map(_unwrap, {**kwargs, **({"device": "cpu"} if target is not None else {})})
    )
    if name == "aten::copy_" and not isinstance(args[0], OnDevice):
        return args[0]
    if to_host:
        return made
    return _wrapped(func, made, args, kwargs)


def _wrapped(func: Any, made: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Wrap results; an operation in place returns the tensor it was given."""
    known = {id(each.inner): each for each in _tensors((args, kwargs)) if isinstance(each, OnDevice)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(wrap, made)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for each in torch.utils._pytree.tree_leaves(tree):
        if isinstance(each, torch.Tensor):
            yield each


def _unwrap(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.inner
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _refuse_mixture(name: str, found: list[torch.Tensor], ours: list[OnDevice]) -> None:
    # A number as a CPU tensor without dimensions may meet any device, as on a GPU.
    others = [each for each in found if not isinstance(each, OnDevice) and each.dim() > 0]
    if ours and others:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {DEVICE} and {others[0].device}, {place()}."
        )


def _count(name: str, args: Any, kwargs: dict[str, Any], is_ours: bool) -> None:
    to = kwargs.get("device")
    is_upload = name == "aten::_to_copy" and to is not None and torch.device(to).type == NAME and not is_ours
    is_upload = is_upload or (name == "aten::copy_" and is_ours and not isinstance(args[1], OnDevice))
    if is_upload and not kwargs.get("non_blocking") and not (len(args) > 2 and args[2]):
        # torch waits for the stream after a copy from the host's memory, unless it is told not to.
        waits["copy to device", place()] += 1
    if not is_ours:
        return
    kind = WAITING.get(name)
    if name == "aten::_to_copy" and kwargs.get("device") is not None and torch.device(kwargs["device"]).type != NAME:
        kind = "copy to host"
    if name == "aten::copy_" and not isinstance(args[0], OnDevice):
        kind = "copy to host"
    if name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
        each is not None and each.dtype == torch.bool for each in args[1]
    ):
        kind = "index by booleans"
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        kind = "repeat_interleave by tensor"
    if kind is not None:
        waits[kind, place()] += 1


def place() -> str:
    """Return the innermost function of ours that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            return f"{path.removeprefix(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
