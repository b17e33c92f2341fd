"""From hidden states to one value per position without ever holding all logits.

Logits of N positions take N x V numbers, four times over while they are differentiated. Above a size, positions are
therefore taken in chunks. Where the projection's weights get no gradient (a write), each chunk's derivative by its
hidden states is taken on the spot and nothing is computed twice; otherwise (training) chunks are recomputed in the
backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from memdlm.types import LogitReadout, Project, Readout

MAX_LOGITS = 2**26
"""Logits (numbers) up to which nothing is chunked when chunks have to be recomputed."""
MAX_CONSTANT_LOGITS = 2**23
"""Logits up to which nothing is chunked when the projection is a constant."""


def read_in_chunks(
    readout: Readout, hidden: Tensor, project: Project, vocab_size: int, *, is_constant: bool = False
) -> Tensor:
    """Return `readout` of all positions, [N], for `hidden` [N, D].

    `is_constant` promises that no gradient with respect to the projection, and no second derivative, will be asked
    for. Values and gradients are those of one call with all positions, up to rounding.
    """
    count = hidden.shape[0]
    limit = MAX_CONSTANT_LOGITS if is_constant or not torch.is_grad_enabled() else MAX_LOGITS
    is_written = is_constant and torch.is_grad_enabled() and isinstance(readout, LogitReadout) and count > 0
    if count * vocab_size <= limit and not is_written:
        return readout(hidden, slice(0, count), project)
    rows = max(1, limit // vocab_size)
    chunks = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    if not torch.is_grad_enabled():
        return torch.cat([readout(hidden[chunk], chunk, project) for chunk in chunks])
    if is_constant:
        values: Tensor = _RowGradients.apply(hidden, readout, project, chunks)
        return values
    return torch.cat([checkpoint(readout, hidden[each], each, project, use_reentrant=False) for each in chunks])


class _RowGradients(torch.autograd.Function):
    """A value depends on its own row alone, so the row's derivative, times what arrives, is the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, readout: Readout, project: Project, chunks: list[slice]) -> Tensor:
        values, gradients = [], []
        for chunk in chunks:
            with torch.enable_grad():
                rows = hidden[chunk].detach().requires_grad_()
                # A view, because torch's counters and module trackers refuse a leaf as a module's input here.
                if isinstance(readout, LogitReadout):
                    logits = project(rows.view_as(rows))
                    found, arriving = readout.consume(logits, chunk)
                    (gradient,) = torch.autograd.grad(logits, rows, arriving)
                else:
                    found = readout(rows.view_as(rows), chunk, project)
                    (gradient,) = torch.autograd.grad(found.sum(), rows)
            values.append(found.detach())
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * arriving.to(gradient.dtype)[:, None], None, None, None
