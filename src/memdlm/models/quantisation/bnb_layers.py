"""4-bit weights (nf4, double quantisation) on bitsandbytes, which this module needs: import it only where 4-bit is on.

It avoids three faults of bitsandbytes 0.50 on a CPU. A layer in evaluation mode repacks its weight at the first call
without gradients, and from then on silently returns no gradient to its input. The kernels for that packing can kill the
process on an input without rows. Neither happens while the layer is in training mode, so it stays in that mode. And
rows that are not a multiple of a block of 64 are unpacked with the scales of wrong blocks, so all rows are unpacked as
one long row.
"""

import copy
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.models.blocks.experts import StackedWeight, grouped_linear

BLOCK = 64
"""Weights that share a scale: bitsandbytes' default."""
PIECE = BLOCK * 2**16
"""Weights that are quantised at a time."""


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """A linear layer with an nf4 weight [out, in]; gradients reach its input in every mode of the model."""

    def __init__(self, like: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__(
            like.in_features,
            like.out_features,
            bias=like.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device=like.weight.device,
        )

    def train(self, mode: bool = True) -> "Linear4bit":
        """Stay in training mode, whatever the model's mode; the layer has no dropout that this would switch on."""
        return super().train(True)

    def unpacked(self) -> Tensor:
        """Return the weight [out, in] in the dtype it was quantised from."""
        return unpack(self.weight, self.weight.quant_state)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension, with bitsandbytes' kernels if a row consists of whole blocks."""
        if self.in_features % BLOCK == 0:
            return super().forward(x)
        out = _Product.apply(x.to(self.compute_dtype), None, None, self, False)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.to(x.dtype)


class Stacked4bit(StackedWeight):
    """The weights [E, out, in] of a layer's experts, nf4; the needed ones are unpacked for one product."""

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.packed = nn.Parameter(packed.data, requires_grad=False)
        self.state = packed.quant_state

    def _apply(self, fn: Any, recurse: bool = True) -> "Stacked4bit":
        super()._apply(fn, recurse)
        self.state.to(self.packed.device)
        return self

    def unpacked(self) -> Tensor:
        """Return the weights [E, out, in] in the dtype they were quantised from."""
        return unpack(self.packed, self.state)

    def unpacked_some(self, experts: Tensor) -> Tensor:
        """Return the weights [N, out, in] of `experts` [N] int64: the same bits, without unpacking the others.

        Raises ConfigError unless every expert's weights are whole blocks (`is_divisible`).
        """
        if not self.is_divisible:
            raise ConfigError(f"experts of {tuple(self.state.shape[1:])} weights share blocks of {BLOCK}; unpack all.")
        count, state, scales = self.state.shape[0], self.state, self.state.state2
        packed = self.packed.view(count, -1).index_select(0, experts)
        eighths = state.absmax.view(count, -1).index_select(0, experts)
        place = experts[:, None] * eighths.shape[1] + torch.arange(eighths.shape[1], device=experts.device)
        # Double quantisation, undone as bitsandbytes does it.
        absmax = scales.code[eighths.int()] * scales.absmax[place // scales.blocksize] + state.offset
        shape = torch.Size([len(experts), *state.shape[1:]])
        plain = bitsandbytes.functional.QuantState(
            absmax=absmax.flatten(), shape=shape, dtype=state.dtype, blocksize=BLOCK, code=state.code, quant_type="nf4"
        )
        return unpack(packed.view(-1, 1), plain)

    @property
    def is_divisible(self) -> bool:
        """Whether every expert's weights are whole blocks."""
        return self.state.shape[1:].numel() % BLOCK == 0

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """Unpack and multiply; nothing unpacked is kept, and the backward pass unpacks again.

        With few rows, as in decoding, only their experts are unpacked, one for each row. The host does not learn which
        they are, so an expert of two rows is unpacked twice. With more rows than half the number of experts, it is
        cheaper to unpack all.
        """
        rows = x.shape[0]
        if not 0 < rows <= self.state.shape[0] // 2 or not self.is_divisible:
            return _Product.apply(x, ends, None, self, False)
        row = torch.arange(rows, dtype=ends.dtype, device=ends.device)
        return _Product.apply(x, row + 1, torch.searchsorted(ends, row, right=True), self, False)


class _Product(torch.autograd.Function):
    """x -> x W^T (per group, if there are groups), or x W if `transposed`: each is the other's gradient.

    `experts` are the groups' experts; None means all of them in order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ends: Tensor | None,
        experts: Tensor | None,
        holder: Linear4bit | Stacked4bit,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(ends, experts)
        ctx.holder, ctx.transposed = holder, transposed
        if experts is not None and isinstance(holder, Stacked4bit):
            weight = holder.unpacked_some(experts).to(x.dtype)
        else:
            weight = holder.unpacked().to(x.dtype)
        if transposed:
            weight = weight.transpose(-1, -2)
        return x @ weight.transpose(-1, -2) if ends is None else grouped_linear(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        ends, experts = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        # Applied again rather than computed here, so that the gradient can itself be differentiated.
        # Made contiguous, because grouped products take no expanded tensor, such as the gradient of a sum.
        found = _Product.apply(gradients[0].contiguous(), ends, experts, ctx.holder, not ctx.transposed)
        return found, None, None, None, None


def unpack(packed: Tensor, state: Any) -> Tensor:
    """Return the weight that `packed` stands for, in its own shape."""
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return bitsandbytes.functional.dequantize_4bit(packed, flat).view(state.shape)


def quantise(weight: Tensor, module: nn.Module) -> Any:
    """Return `weight` as an nf4 parameter of `module`, on the device it is on.

    bitsandbytes' quantisation takes many times the weight's memory on a CPU, so it is given pieces of whole blocks;
    the result is bitwise the same.
    """
    functional, weight = bitsandbytes.functional, weight.contiguous()
    size = weight.numel()
    packed = torch.empty((size + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(-(-size // BLOCK), dtype=torch.float32, device=weight.device)
    for start in range(0, size, PIECE):
        piece, of_piece = functional.quantize_4bit(
            weight.view(-1)[start : start + PIECE], blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        packed[start // 2 : start // 2 + len(piece)] = piece
        scales[start // BLOCK : start // BLOCK + len(of_piece.absmax)] = of_piece.absmax
    # Double quantisation: the scales, less their mean, in 8 bits.
    offset = scales.mean()
    scales, of_scales = functional.quantize_blockwise(scales - offset, blocksize=4 * BLOCK)
    state = functional.QuantState(
        absmax=scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=functional.get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
        offset=offset,
        state2=of_scales,
    )
    owner = module if isinstance(module, bitsandbytes.nn.Linear4bit) else None
    if owner is not None:
        owner.quant_state = state
    return bitsandbytes.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        module=owner,
        bnb_quantized=True,
    )
