"""Chunked linear cross-entropy, and other functions of each token's logits, without holding all logits at once.

Logits of N positions take N x V numbers, and four times as many while they are differentiated. So above a certain size
positions are taken in chunks. There are three cases. If the projection's weights get no gradient (a write), each
chunk's derivative by its hidden states is taken at once, and nothing is computed twice. The same holds if only a
weighted sum of the values is wanted and the weights are known beforehand (training): the projection's own gradient is
then added up chunk by chunk. Otherwise chunks are recomputed in the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from memdlm.types import PerToken, Project, TokenLoss

MAX_LOGITS = 2**26
"""The most logits without chunks, where chunks would be recomputed; on a GPU at least this many."""
MAX_CONSTANT_LOGITS = 2**23
"""Logits of a chunk when the projection is a constant; on a GPU at least this many."""
MAX_SUMMED_LOGITS = 2**23
"""Logits of a chunk when the projection's gradient is added up: each chunk reads and writes all of that gradient. On a
GPU at least this many."""
SHARE = 32
"""On a GPU, a chunk's logits may fill its memory divided by this number."""
BYTES = 16
"""Bytes that a logit takes while it is differentiated: four float32 numbers."""


def at_once(least: int, device: torch.device) -> int:
    """Return how many logits a chunk has on `device`.

    A GPU reads the projection's weights again for every chunk, so it gets large chunks. Their size depends on its total
    memory, not on the free memory, so that the same card always adds up in the same order.
    """
    if device.type != "cuda":
        return least
    return max(least, torch.cuda.get_device_properties(device).total_memory // (SHARE * BYTES))


def values_in_chunks(
    per_token: PerToken, hidden: Tensor, project: Project, vocab_size: int, *, is_constant: bool = False
) -> Tensor:
    """Return `per_token` of all positions, [N], for `hidden` [N, D].

    `is_constant` promises that no gradient with respect to the projection, and no second derivative, will be asked
    for. Values and gradients are those of one call with all positions, up to rounding.
    """
    count = hidden.shape[0]
    limit = at_once(MAX_CONSTANT_LOGITS if is_constant or not torch.is_grad_enabled() else MAX_LOGITS, hidden.device)
    is_written = is_constant and torch.is_grad_enabled() and isinstance(per_token, TokenLoss) and count > 0
    if count * vocab_size <= limit and not is_written:
        return per_token(hidden, slice(0, count), project)
    rows = max(1, limit // vocab_size)
    chunks = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    if not torch.is_grad_enabled():
        return torch.cat([per_token(hidden[chunk], chunk, project) for chunk in chunks])
    if is_constant:
        values: Tensor = _RowGradients.apply(hidden, per_token, project, chunks)
        return values
    return torch.cat([checkpoint(per_token, hidden[each], each, project, use_reentrant=False) for each in chunks])


def sum_in_chunks(
    per_token: PerToken,
    hidden: Tensor,
    project: Project,
    vocab_size: int,
    weights: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return (the sum [] of `weights` [N] times `per_token` of all positions, those values [N] without gradient).

    `parameters` are all those of `project` that may need a gradient. The sum can be differentiated by them
    and by `hidden` [N, D], once; not by `weights`. Values and gradients are those of one call, up to rounding.
    """
    count = hidden.shape[0]
    trained = [each for each in parameters if each.requires_grad]
    # A parameter that is sharded to nothing must get its gradient where its module's own hooks can see it.
    is_whole = all(each.numel() for each in trained)
    if not torch.is_grad_enabled() or not isinstance(per_token, TokenLoss) or not count or not is_whole:
        values = values_in_chunks(per_token, hidden, project, vocab_size)
        return (values * weights.to(values.dtype)).sum(), values.detach()
    rows = max(1, at_once(MAX_SUMMED_LOGITS, hidden.device) // vocab_size)
    chunks = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    total, values = _Summed.apply(hidden, weights, per_token, project, chunks, *trained)
    return total, values


class _Summed(torch.autograd.Function):
    """The weights are known, so every chunk's part of the gradients is computed with its values."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        per_token: TokenLoss,
        project: Project,
        chunks: list[slice],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # In 16 bits, small weights times small probabilities would vanish. So the largest weight is scaled to 1.
        scale = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        relative = weights / scale
        values, of_rows = [], []
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        for chunk in chunks:
            with torch.enable_grad():
                rows = hidden[chunk].detach().requires_grad_()
                # A view, because torch's counters and module trackers refuse a leaf as a module's input here.
                logits = project(rows.view_as(rows))
                found, arriving = per_token.consume(logits, chunk)
                arriving = arriving.mul_(relative[chunk, None].to(arriving.dtype))
                gradient, *more = torch.autograd.grad(logits, (rows, *parameters), arriving, allow_unused=True)
            del logits, arriving
            if len(chunks) > 1:
                # In 16 bits, parts that are small beside the sum so far would be lost.
                more = [each if each is None or each.itemsize > 2 else each.float() for each in more]
            values.append(found)
            of_rows.append(gradient)
            of_parameters = [_added(*pair) for pair in zip(of_parameters, more, strict=True)]
        of_parameters = [
            None if each is None else each.to(own.dtype) for each, own in zip(of_parameters, parameters, strict=True)
        ]
        ctx.gradients = [torch.cat(of_rows), *of_parameters]
        ctx.scale = scale
        found = torch.cat(values)
        ctx.mark_non_differentiable(found)
        return (found * weights.to(found.dtype)).sum(), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a sum over chunks can be differentiated once: its gradients are no longer kept.")
        # Scaled in place: the projection's gradient may be the largest tensor of all.
        factor, gradients, ctx.gradients = arriving * ctx.scale, ctx.gradients, None
        hidden, *parameters = (None if each is None else each.mul_(factor.to(each.dtype)) for each in gradients)
        return hidden, None, None, None, None, *parameters


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


class _RowGradients(torch.autograd.Function):
    """A value depends on its own row alone, so the row's derivative, times what arrives, is the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, per_token: PerToken, project: Project, chunks: list[slice]) -> Tensor:
        values, gradients = [], []
        for chunk in chunks:
            with torch.enable_grad():
                rows = hidden[chunk].detach().requires_grad_()
                # A view, because torch's counters and module trackers refuse a leaf as a module's input here.
                if isinstance(per_token, TokenLoss):
                    logits = project(rows.view_as(rows))
                    found, arriving = per_token.consume(logits, chunk)
                    (gradient,) = torch.autograd.grad(logits, rows, arriving)
                else:
                    found = per_token(rows.view_as(rows), chunk, project)
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
