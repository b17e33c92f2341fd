"""Checks for NaN and infinity that do not wait for a device."""

import torch
from torch import Tensor


def are_logits(logits: Tensor) -> Tensor:
    """Return [] bool on the device: whether a token can be chosen from every row of `logits` [N, V].

    NaN and plus infinity are not allowed. Minus infinity is: it rules a token out.
    """
    return logits.detach().amax(-1).isfinite().all()


def is_finite(tensor: Tensor) -> Tensor:
    """Return [] bool on the tensor's device: whether nothing in `tensor` is NaN or infinite."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    # aminmax returns NaN if the tensor holds one. Unlike isfinite, it needs no memory.
    least, most = tensor.detach().aminmax()
    return least.isfinite() & most.isfinite()
