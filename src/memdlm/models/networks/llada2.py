"""LLaDA2.0 and 2.1 (inclusionAI/LLaDA2.x-mini): fused query-key-value, group-limited sigmoid routing, shared experts.

Full attention unless an `attention_pattern` says otherwise; decoding passes `BlockCausal`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from memdlm.errors import ConfigError
from memdlm.models.blocks.experts import Experts
from memdlm.models.blocks.layers import AttentionShape, Block, GatedMLP, SelfInitialising, accurate
from memdlm.models.blocks.published import PublishedConfig
from memdlm.models.networks.backbone import Backbone, MaskedDiffusionLM


class LLaDA2MoeConfig(PublishedConfig):
    """Fields as published. `norm_topk_prob`, `score_function`, `router_dtype` and dropouts have no effect."""

    model_type = "llada2_moe"
    published_architectures = ("LLaDA2MoeModelLM", "LLaDA2MoeModel")
    telling_fields = (frozenset({"first_k_dense_replace"}), frozenset({"n_group"}))
    telling_tensors = ("word_embeddings.", ".query_key_value.")

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 0
    """0 or None: as many as `num_attention_heads`."""
    head_dim: int = 0
    """0 or None: `hidden_size` divided by `num_attention_heads`."""
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    moe_router_enable_expert_bias: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    use_qk_norm: bool = True
    partial_rotary_factor: float = 0.5
    rope_theta: float = 600000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self._check(kwargs)
        super().__post_init__(**kwargs)

    def _check(self, others: dict[str, object]) -> None:
        size = self.num_experts // max(1, self.n_group)
        if self.n_group < 1 or self.num_experts % self.n_group or size < 2:
            raise ConfigError(
                f"num_experts {self.num_experts} in n_group {self.n_group}: groups must be equal and have at least 2."
            )
        if not 1 <= self.topk_group <= self.n_group or self.num_experts_per_tok > self.topk_group * size:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} of topk_group {self.topk_group} groups of {size}: "
                f"choose 1 to {self.n_group} groups that hold enough experts."
            )
        if others.pop("rope_scaling", None) is not None:
            raise ConfigError("rope_scaling is set, but no published LLaDA2 scales its rotary positions; remove it.")


class LLaDA21MoeConfig(LLaDA2MoeConfig):
    """The model type of one published LLaDA2.1 file; reading it gives a `LLaDA2MoeConfig`."""

    model_type = "llada21_moe"


class LLaDA2Moe21Config(LLaDA2MoeConfig):
    """The model type of another published LLaDA2.1 file; reading it gives a `LLaDA2MoeConfig`."""

    model_type = "llada2_moe_21"


class GroupRouter(SelfInitialising):
    """Sigmoid scores; the best groups, then the best experts in them, by biased score; weights are unbiased."""

    expert_bias: Tensor | None

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.num_chosen, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.num_groups, self.num_chosen_groups = config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def initialise(self, config: LLaDA2MoeConfig) -> None:
        """Draw the weight from N(0, initializer_range^2); the bias starts at 0."""
        init.normal_(self.weight, std=config.initializer_range)
        if self.expert_bias is not None:
            init.zeros_(self.expert_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (expert [T, k], weight [T, k]) for `x` [T, D]; computed in float32 or wider."""
        dtype = accurate(x.dtype)
        score = (x.to(dtype) @ self.weight.to(dtype).t()).sigmoid()
        ranking = score if self.expert_bias is None else score + self.expert_bias.to(dtype)
        grouped = ranking.unflatten(-1, (self.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.num_chosen_groups, dim=-1).indices
        is_open = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        ranking = grouped.masked_fill(~is_open[..., None], float("-inf")).flatten(-2)
        expert = ranking.topk(self.num_chosen, dim=-1).indices
        weight = score.gather(-1, expert)
        if self.num_chosen > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return expert, (weight * self.scaling).to(x.dtype)


class SparseMLP(nn.Module):
    """Routed experts plus the shared ones, which are one feed-forward of their joint width."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = GroupRouter(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        width = config.moe_intermediate_size * (config.num_shared_experts or 0)
        self.shared_experts = GatedMLP(config.hidden_size, width) if width else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to [B, L, D]."""
        flat = x.flatten(0, 1)
        out = self.experts(flat, *self.gate(flat)).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class LLaDA2MoeLayer(Block):
    """Attention, then a dense feed-forward (first layers) or experts."""

    def __init__(self, config: LLaDA2MoeConfig, index: int) -> None:
        shape = AttentionShape.of(
            config,
            bias=config.use_qkv_bias,
            out_bias=config.use_bias,
            fused=True,
            qk_norm_eps=config.rms_norm_eps if config.use_qk_norm else None,
        )
        is_dense = index < config.first_k_dense_replace
        dense = (config.hidden_size, config.intermediate_size)
        super().__init__(config, index, shape, GatedMLP(*dense) if is_dense else SparseMLP(config))


class LLaDA2MoeModel(Backbone):
    """LLaDA2.x without its vocabulary projection."""

    config_class = LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2MoeLayer"]

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        if config.num_shared_experts == 0:
            # Published files then hold shared experts of width 0, which carry nothing.
            self._keys_to_ignore_on_load_unexpected = [r"\.shared_experts\."]
        self.build(
            LLaDA2MoeLayer, rotated=config.head_dim * config.partial_rotary_factor, padding_index=config.pad_token_id
        )


class LLaDA2MoeModelLM(MaskedDiffusionLM):
    """LLaDA2.x as a masked diffusion language model."""

    config_class = LLaDA2MoeConfig
    backbone_class = LLaDA2MoeModel
    right_shift_logits = False
    published_names = (
        ("word_embeddings.", "embed_tokens."),
        (".attention.", ".self_attn."),
        (".self_attn.dense.", ".self_attn.o_proj."),
        (".self_attn.query_layernorm.", ".self_attn.q_norm."),
        (".self_attn.key_layernorm.", ".self_attn.k_norm."),
    )
    # Half precision would round the bias by more than the margins between experts.
    _keep_in_fp32_modules_strict = {"expert_bias"}
