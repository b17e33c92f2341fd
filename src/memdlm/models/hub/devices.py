"""Where a model runs and in which dtype: the rule behind "auto", and checks of device names before anything runs.

The rule is only here. Commands, the Python interface, evaluation and training ask these functions.
"""

import functools
import logging
import os
from collections.abc import Callable

import torch

from memdlm.errors import ConfigError, MachineError

AUTO = "auto"
DEVICE_HELP = (
    "Device to run on: auto, or a name such as cpu or cuda:1. auto: a CUDA card if there is one (in a "
    "distributed launch, the card of this process), else Apple's MPS if what is needed runs on it, "
    "else the CPU."
)
DTYPE_HELP = "Number type of the weights. auto: the checkpoint's own if the device can compute in it, else float32."
BFLOAT16_CAPABILITY = (8, 0)
"""The lowest compute capability of CUDA cards that compute in bfloat16; older ones only emulate it."""

log = logging.getLogger(__name__)


def check_device(wanted: str | torch.device) -> torch.device:
    """Return the device called `wanted`.

    Raises ConfigError for a name that is not a device's, MachineError for a device that this machine does not have.
    """
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"device: {wanted!r} is no device. Possible: auto, cpu, cuda, cuda:0, cuda:1, ...") from error
    if device.type == "meta":
        raise ConfigError("device: 'meta' holds no numbers, nothing can be computed there. Name auto, cpu or cuda.")
    if device.type == "cpu":
        return device
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        module = None
    if module is None or not module.is_available():
        raise MachineError(f"device: {str(wanted)!r} is not there: torch finds no such device here. Name auto or cpu.")
    if device.index is not None and device.index >= module.device_count():
        raise MachineError(
            f"device: {str(wanted)!r} is not there: this machine has {module.device_count()}, counted from 0. "
            "Name one of these, or auto."
        )
    return device


def choose_device(
    wanted: str | torch.device = AUTO, *, dtype: torch.dtype = torch.float32, load_in_4bit: bool = False
) -> torch.device:
    """Return the device that `wanted` means; a name is checked, "auto" follows the rule.

    The rule: the CPU if accelerate was launched for it (ACCELERATE_USE_CPU); else a CUDA card, which in a distributed
    launch (LOCAL_RANK) is the process's own; else Apple's MPS if all that memdlm needs runs on it in `dtype` (if not, a
    log message says so); else the CPU.

    Raises ConfigError for a name that is not a device's and for a LOCAL_RANK that is not a number, MachineError for a
    device that this machine does not have.
    """
    if wanted != AUTO:
        return check_device(wanted)
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return torch.device("cpu")
    if cuda_is_there():
        rank = _local_rank()
        # Modulo, as accelerate does: a launcher may also show every process only its own card.
        return torch.device("cuda") if rank is None else torch.device("cuda", rank % cuda_count())
    if mps_is_there():
        if load_in_4bit:
            _say_once("MPS is there, but 4-bit weights are computed on CUDA cards and the CPU only: the CPU is used.")
        elif mps_problem(dtype) is None:
            return torch.device("mps")
    return torch.device("cpu")


def choose_dtype(published: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that "auto" means for weights published in `published` on `device`.

    It is the published one where the device computes in it: bfloat16 on CUDA cards of capability 8.0 and later, and on
    the CPU every dtype. Elsewhere it is float32, which holds every bfloat16 and float16 number; a log message says so.
    """
    if computes_in(device, published):
        return published
    _say_once(
        f"the weights are published in {name_of(published)}, in which {name_of(device)} does not compute: float32 is "
        "used. It takes the memory of 4 bytes per number; another dtype can be named."
    )
    return torch.float32


def computes_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` computes in `dtype` by itself."""
    if device.type == "cpu":
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or cuda_capability(device) >= BFLOAT16_CAPABILITY
    return _failing(lambda: _multiply(device, dtype), "") is None


def trains_on_the_cpu() -> bool:
    """Whether training has only the CPU: there is no accelerator, or only an MPS that lacks what it needs."""
    if not torch.accelerator.is_available():
        return True
    return not cuda_is_there() and mps_is_there() and mps_problem(torch.float32) is not None


def cuda_is_there() -> bool:
    """Whether torch finds a CUDA card."""
    return torch.cuda.is_available()


def cuda_count() -> int:
    """Return how many CUDA cards there are."""
    return torch.cuda.device_count()


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Return a CUDA card's compute capability, (8, 0) for an A100."""
    return torch.cuda.get_device_capability(device)


def mps_is_there() -> bool:
    """Whether torch finds Apple's MPS."""
    return torch.backends.mps.is_available()


@functools.cache
def mps_problem(dtype: torch.dtype) -> str | None:
    """Return what memdlm needs and MPS cannot do, and log it; None if all of it runs."""
    found = problem_of(torch.device("mps"), dtype)
    if found is not None:
        _say_once(f"MPS is there, but not all that memdlm needs runs on it ({found}): the CPU is used.")
    return found


def problem_of(device: torch.device, dtype: torch.dtype) -> str | None:
    """Try what memdlm needs of `device` on a few numbers; return the first thing that fails, or None.

    Waits for the device, so it is called once, before a model is loaded.
    """
    return (
        _failing(lambda: _multiply(device, dtype), f"a matrix product in {name_of(dtype)}")
        or _failing(lambda: _sort_and_count(device), "sorting and counting int64")
        or _failing(lambda: _sum_widely(device), "float64, in which losses are summed and samples drawn")
    )


def _failing(probe: Callable[[], bool], what: str) -> str | None:
    """Return `what`, and why, unless `probe` gives the right result."""
    try:
        return None if probe() else f"{what}: the result is wrong"
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        return f"{what}: {said if len(said) <= 120 else f'{said[:117]}...'}"


def _multiply(device: torch.device, dtype: torch.dtype) -> bool:
    ones = torch.ones(8, 8, device=device, dtype=dtype)
    return (ones @ ones).sum().item() == 512


def _sort_and_count(device: torch.device) -> bool:
    numbers = torch.tensor([2, 0, 2, 1], device=device)
    ordered, counted = numbers.argsort(stable=True), numbers.bincount(minlength=4)
    return ordered.tolist() == [1, 3, 0, 2] and counted.tolist() == [1, 1, 2, 0]


def _sum_widely(device: torch.device) -> bool:
    return torch.ones(3, device=device).double().sum().item() == 3


def _local_rank() -> int | None:
    given = os.environ.get("LOCAL_RANK")
    if given is None:
        return None
    if not given.isdecimal():
        raise ConfigError(
            f"LOCAL_RANK={given!r} is no number of a process on this machine; launchers set it to 0, 1, ... Unset it, "
            "or name the device."
        )
    return int(given)


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def name_of(what: torch.device | torch.dtype) -> str:
    """Return a device with the name of its card, or a dtype, in words: "cuda:0 (NVIDIA A100-SXM4-80GB)", "bfloat16"."""
    if isinstance(what, torch.dtype):
        return str(what).removeprefix("torch.")
    if what.type != "cuda":
        return str(what)
    index = torch.cuda.current_device() if what.index is None else what.index
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def job_line(
    device: torch.device,
    dtype: str | torch.dtype,
    attention: str | None,
    *,
    is_quantised: bool = False,
    autocast: torch.dtype | None = None,
) -> str:
    """Return the first line of a job: on which device it runs, in which dtype, with which attention."""
    number = name_of(dtype) if isinstance(dtype, torch.dtype) else "the dtype of their files"
    weights = f"weights in 4 bits (nf4), the others in {number}" if is_quantised else f"weights in {number}"
    products = "" if autocast is None else f", products in {name_of(autocast)} (autocast)"
    return f"device {name_of(device)}, {weights}{products}, attention {attention or 'its own'}"
