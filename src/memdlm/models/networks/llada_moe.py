"""LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B): bidirectional attention, softmax-routed experts.

Parameter names and layout on disk are the published ones, one tensor per expert; in memory the experts of a layer
are stacked (`memdlm.models.blocks.experts`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.models.blocks.experts import Experts
from memdlm.models.blocks.layers import AttentionShape, Block, GatedMLP, accurate
from memdlm.models.blocks.published import PublishedConfig
from memdlm.models.networks.backbone import Backbone, MaskedDiffusionLM


class LLaDAMoEConfig(PublishedConfig):
    """Fields as published. `norm_topk_prob` and the router's group and scaling fields have no effect, as published."""

    model_type = "lladamoe"
    published_architectures = ("LLaDAMoEModelLM", "LLaDAMoEModel")
    telling_fields = (frozenset({"num_experts", "expert_intermediate_size"}),)
    telling_tensors = (".mlp.experts.",)  # after LLaDA2, which has its own telling ones

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int = 8192
    expert_intermediate_size: int = 1024
    shared_expert_intermediate_size: int | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    """0 or None: as many as `num_attention_heads`."""
    head_dim: int = 0
    """0 or None: `hidden_size` divided by `num_attention_heads`."""
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] = None  # type: ignore[assignment]
    """Per layer, 1 for experts and 0 for a dense one; unset: experts everywhere."""
    moe_router_enable_expert_bias: bool | None = False
    qk_layernorm: bool = True
    attention_bias: bool = False
    clip_qkv: float | None = None
    partial_rotary_factor: float = 1.0
    rope_theta: float = 50000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.moe_layer_freq is None:
            self.moe_layer_freq = [1] * self.num_hidden_layers
        self.moe_layer_freq = list(self.moe_layer_freq)
        self._check(kwargs)
        super().__post_init__(**kwargs)

    def _check(self, others: dict[str, object]) -> None:
        if len(self.moe_layer_freq) != self.num_hidden_layers:
            raise ConfigError(
                f"moe_layer_freq has {len(self.moe_layer_freq)} entries for {self.num_hidden_layers} layers; "
                "give one per layer, 1 for a mixture of experts and 0 for a dense layer."
            )
        if others.pop("rope_scaling", None) is not None:
            raise ConfigError("rope_scaling is set, but no published LLaDA-MoE scales its rotary positions; remove it.")


class SparseMLP(nn.Module):
    """Softmax router over all experts; the chosen probabilities are used as they are, not renormalised."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_intermediate_size)
        bias = torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (expert [T, k], weight [T, k]); a bias, if any, moves the choice and the weights alike."""
        scores = self.gate(x)
        probability = scores.softmax(-1, dtype=accurate(scores.dtype))
        if self.expert_bias is not None:
            probability = probability + self.expert_bias
        weight, expert = probability.topk(self.num_chosen, dim=-1)
        return expert, weight.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to [B, L, D]."""
        flat = x.flatten(0, 1)
        return self.experts(flat, *self.route(flat)).view_as(x)


class LLaDAMoELayer(Block):
    """Attention, then a mixture of experts (plus a shared expert, if any) or a dense feed-forward."""

    def __init__(self, config: LLaDAMoEConfig, index: int) -> None:
        shape = AttentionShape.of(
            config,
            bias=config.attention_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_layernorm else None,
            clip_qkv=config.clip_qkv,
        )
        is_dense = not config.moe_layer_freq[index]
        dense = (config.hidden_size, config.dense_intermediate_size)
        super().__init__(config, index, shape, GatedMLP(*dense) if is_dense else SparseMLP(config))
        # Saved optimizer states go by the order of parameters: here the norms' come before the feed-forward's.
        self.mlp = self._modules.pop("mlp")
        if not is_dense and config.shared_expert_intermediate_size is not None:
            self.shared_expert = GatedMLP(config.hidden_size, config.shared_expert_intermediate_size)


class LLaDAMoEModel(Backbone):
    """LLaDA-MoE without its vocabulary projection."""

    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoELayer"]

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.build(
            LLaDAMoELayer, rotated=config.head_dim * config.partial_rotary_factor, padding_index=config.pad_token_id
        )


class LLaDAMoEModelLM(MaskedDiffusionLM):
    """LLaDA-MoE as a masked diffusion language model."""

    config_class = LLaDAMoEConfig
    backbone_class = LLaDAMoEModel
    right_shift_logits = False
