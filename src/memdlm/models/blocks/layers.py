"""The parts every family shares: normalisation, rotary positions, attention, gated feed-forward, and their block.

B batch, L length, D hidden width, H heads, P width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memdlm.models.blocks.key_values import Cached, at, rows_at
from memdlm.models.blocks.masks import Segmented, columns_of


def accurate(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms, rotations and routing are computed: float32, or float64 if given that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class SelfInitialising(nn.Module):
    """A module that sets its own starting values; transformers' initialisation calls `initialise`."""

    def initialise(self, config: Any) -> None:
        """Set own parameters through `transformers.initialization`, after the children's."""
        raise NotImplementedError


class RMSNorm(nn.Module):
    """x / rms(x) * weight (+ bias), computed in float32 and cast back before the weight is applied."""

    def __init__(self, width: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.to(accurate(x.dtype))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out = self.weight * wide.to(x.dtype)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotary:
    """Rotary position embedding on the first `width` dimensions of a head (half-split pairing).

    Holds no buffers: angles are recomputed per forward pass, which costs nothing beside attention and cannot be
    left uninitialised or rounded when a checkpoint is loaded.
    """

    width: int
    theta: float

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [B or 1, 1, L, width], for `positions` [B or 1, L], in at least float32."""
        dtype = accurate(like.dtype)
        # Frequencies are float32 as published, whatever the network computes in.
        exponent = torch.arange(0, self.width, 2, device=like.device, dtype=torch.float32) / self.width
        frequency = (1.0 / self.theta**exponent).to(dtype)
        angle = positions.to(dtype)[:, None, :, None] * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `x` [B, H, L, P]; dimensions from `width` on pass through."""
        turned, rest = x[..., : self.width], x[..., self.width :]
        first, second = turned.to(cos.dtype).chunk(2, dim=-1)
        out = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((out.to(x.dtype), rest), dim=-1) if rest.shape[-1] else out.to(x.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Sizes and switches of one attention layer."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool | None = None
    """Whether the output projection has a bias. None: the same as for query, key and value, see `bias`."""
    fused: bool = False
    """Query, key and value are one projection, `query_key_value`: rows of all query heads, then key, then value."""
    qk_norm_eps: float | None = None
    """RMS-normalise queries and keys per head before the rotation, with this epsilon; None: no such norm."""
    clip_qkv: float | None = None

    @classmethod
    def of(cls, config: Any, **switches: Any) -> "AttentionShape":
        """Take the sizes from a configuration that names them as transformers does."""
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            **switches,
        )


class Attention(nn.Module):
    """Bidirectional multi-head attention through transformers' attention interface."""

    is_causal = False

    def __init__(self, config: object, shape: AttentionShape, layer_index: int) -> None:
        super().__init__()
        self.config, self.shape, self.layer_idx = config, shape, layer_index
        self.num_key_value_groups = shape.num_heads // shape.num_key_value_heads
        query_width = shape.num_heads * shape.head_dim
        key_width = shape.num_key_value_heads * shape.head_dim
        self.widths = (query_width, key_width, key_width)
        if shape.fused:
            self.query_key_value = nn.Linear(shape.hidden_size, sum(self.widths), bias=shape.bias)
        else:
            self.q_proj = nn.Linear(shape.hidden_size, query_width, bias=shape.bias)
            self.k_proj = nn.Linear(shape.hidden_size, key_width, bias=shape.bias)
            self.v_proj = nn.Linear(shape.hidden_size, key_width, bias=shape.bias)
        out_bias = shape.bias if shape.out_bias is None else shape.out_bias
        self.o_proj = nn.Linear(query_width, shape.hidden_size, bias=out_bias)
        if shape.qk_norm_eps is not None:
            self.q_norm = RMSNorm(shape.head_dim, shape.qk_norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.qk_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | Segmented | None,
        cached: Cached | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Attend over `x` [B, L, D]; `mask` is what `attention_scores_mask` or `segments_for` returned.

        `cached` adds the keys and values of earlier passes. With `queries` [B, n] only these
        places attend, and the result is [B, n, D].
        """
        shape = self.shape
        if shape.fused:
            query, key, value = self.query_key_value(x).split(self.widths, dim=-1)
            query = at(query, queries)
        else:
            query, key, value = self.q_proj(at(x, queries)), self.k_proj(x), self.v_proj(x)
        if shape.clip_qkv is not None:
            query, key, value = (each.clamp(-shape.clip_qkv, shape.clip_qkv) for each in (query, key, value))
        query, key, value = (each.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for each in (query, key, value))
        if shape.qk_norm_eps is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotary.rotate(query, *(rows_at(each, queries) for each in angles))
        key = rotary.rotate(key, *angles)
        if cached is not None:
            key, value = cached.join(self.layer_idx, key, value)
        if isinstance(mask, Segmented) and queries is not None:
            mask = mask.rows(queries)
        elif isinstance(mask, Tensor):
            mask = rows_at(mask, queries)
        if isinstance(mask, Segmented):
            parts = [
                self._attend(
                    query[:, :, asked], columns_of(key, seen), columns_of(value, seen), mask.of(asked, seen, x.device)
                )
                for asked, seen in mask.parts()
            ]
            return self.o_proj(torch.cat(parts, dim=1).flatten(2))
        return self.o_proj(self._attend(query, key, value, mask).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, L, H, P] for queries [B, H, L, P]."""
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # type: ignore[attr-defined]
            eager_attention,
        )
        scaling = self.shape.head_dim**-0.5
        out, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=scaling, is_causal=False)
        return out


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Explicit softmax attention, the oracle of the fused kernels. Takes [B, H, L, P], returns [B, L, H, P]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            # In float32, because a half precision sum of a score and the lowest number overflows.
            scores = scores.to(accurate(scores.dtype)) + attention_mask
    weights = scores.softmax(-1, dtype=accurate(scores.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases unless asked for."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last dimension."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """Pre-norm attention, then a pre-norm feed-forward, each added to what came in.

    A family's layer gives the feed-forward, dense or of experts. It may set `mixing`, in which neighbours meet before
    attention, and a `shared_expert` beside the feed-forward.
    """

    mixing: nn.Module | None
    shared_expert: nn.Module | None

    def __init__(
        self, config: Any, index: int, shape: AttentionShape, feed_forward: nn.Module, *, norm_bias: bool = False
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, shape, index)
        self.mlp = feed_forward
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, bias=norm_bias)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, bias=norm_bias)
        self.mixing = self.shared_expert = None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | Segmented | None,
        is_visible: Tensor | None,
        cached: Cached | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Run on [B, L, D]; with `queries` [B, n] the output is only that of these places, [B, n, D]."""
        inner = self.input_layernorm(x)
        if self.mixing is not None:
            inner = self.mixing(inner, is_visible)
        x = at(x, queries) + self.self_attn(inner, rotary, angles, mask, cached, queries)
        inner = self.post_attention_layernorm(x)
        out = self.mlp(inner)
        if self.shared_expert is not None:
            out = out + self.shared_expert(inner)
        return x + out
