"""Devices, by name: checked before anything is read."""

import torch

from memdlm.errors import ConfigError, MachineError


def check_device(wanted: str | torch.device) -> torch.device:
    """Return the device called `wanted`.

    Raises ConfigError for a name that is none, MachineError for a device that this machine does not have.
    """
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"device: {wanted!r} is no device. Possible: cpu, cuda, cuda:0, cuda:1, ...") from error
    if device.type == "meta":
        raise ConfigError("device: 'meta' holds no numbers, nothing can be computed there. Name cpu or cuda.")
    if device.type == "cpu":
        return device
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        module = None
    if module is None or not module.is_available():
        raise MachineError(f"device: {str(wanted)!r} is not there: torch finds none on this machine. Name cpu.")
    if device.index is not None and device.index >= module.device_count():
        raise MachineError(
            f"device: {str(wanted)!r} is not there: this machine has {module.device_count()}, counted from 0."
        )
    return device
