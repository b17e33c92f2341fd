"""Whether numbers are numbers, found without waiting for a device."""

import torch
from torch import Tensor


def are_logits(logits: Tensor) -> Tensor:
    """Return [] bool on the device: whether something can be chosen from every row of `logits` [N, V].

    NaN and infinity are no logits; minus infinity is one, that of a token which cannot be.
    """
    return logits.detach().amax(-1).isfinite().all()


def is_finite(tensor: Tensor) -> Tensor:
    """Return [] bool on the tensor's device: whether nothing in `tensor` is NaN or infinite."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    # The extremes of anything with a NaN in it are NaN; unlike isfinite, they need no memory.
    least, most = tensor.detach().aminmax()
    return least.isfinite() & most.isfinite()
