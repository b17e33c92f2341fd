"""LLaDA (GSAI-ML/LLaDA-8B): dense, bidirectional attention, gated feed-forward.

In memory the modules are named as in every other family; on disk they have the published names.
"""

from typing import Any

from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.models.blocks.layers import AttentionShape, Block, GatedMLP
from memdlm.models.blocks.published import PublishedConfig
from memdlm.models.networks.backbone import Backbone, MaskedDiffusionLM

ONLY = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "alibi": False,
    "rope": True,
    "block_group_size": 1,
}
"""Fields with the only value that published LLaDA models use."""


class LLaDAConfig(PublishedConfig):
    """Fields as published; transformers' usual names are aliases.

    Dropout fields have no effect (published: all 0), nor has `rope_full_precision` (rotations are at least float32).
    """

    model_type = "llada"
    published_architectures = ("LLaDAModelLM", "LLaDAModel")
    telling_fields = (frozenset({"d_model"}),)
    telling_tensors = ("transformer.wte.", "transformer.blocks.")
    attribute_map = {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    mlp_hidden_size: int = None  # type: ignore[assignment]
    """Unset: `mlp_ratio` times the width."""
    mlp_ratio: int = 4
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 0
    """0 or None: as many as `n_heads`, or 1 with `multi_query_attention`."""
    multi_query_attention: bool | None = None
    clip_qkv: float | None = None
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    include_bias: bool = False
    include_qkv_bias: bool = False
    bias_for_layer_norm: bool | None = None
    input_emb_norm: bool = False
    scale_logits: bool = False
    weight_tying: bool = False
    max_sequence_length: int = 4096
    init_std: float = 0.02
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        self.n_kv_heads = self.n_kv_heads or (1 if self.multi_query_attention else self.n_heads)
        self._check(kwargs)
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def norm_bias(self) -> bool:
        """Whether norms have an additive part; unset, they follow `include_bias`."""
        return self.include_bias if self.bias_for_layer_norm is None else self.bias_for_layer_norm

    def _check(self, others: dict[str, object]) -> None:
        for name, value in ONLY.items():
            if others.get(name, value) != value:
                raise ConfigError(f"{name}={others[name]!r} is not supported for LLaDA; the only value is {value!r}.")
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"d_model {self.d_model}, n_heads {self.n_heads}, n_kv_heads {self.n_kv_heads}: each must be a "
                "multiple of the next."
            )
        if self.embedding_size is not None and self.embedding_size < self.vocab_size:
            raise ConfigError(f"embedding_size {self.embedding_size} is below vocab_size {self.vocab_size}.")


class LLaDALayer(Block):
    """Attention and a gated feed-forward."""

    def __init__(self, config: LLaDAConfig, index: int) -> None:
        qkv_bias = config.include_bias or config.include_qkv_bias
        shape = AttentionShape.of(config, bias=qkv_bias, out_bias=config.include_bias, clip_qkv=config.clip_qkv)
        feed_forward = GatedMLP(config.d_model, config.mlp_hidden_size, bias=config.include_bias)
        super().__init__(config, index, shape, feed_forward, norm_bias=config.norm_bias)


class EmbeddingScale(nn.Module):
    """Multiplies embeddings by sqrt(D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = width**0.5

    def forward(self, x: Tensor, is_visible: Tensor | None) -> Tensor:
        """Scale [B, L, D]."""
        return x * self.factor


class LLaDAModel(Backbone):
    """LLaDA without its vocabulary projection."""

    config_class = LLaDAConfig
    _no_split_modules = ["LLaDALayer"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.build(
            LLaDALayer,
            norm_bias=config.norm_bias,
            vocab_size=config.embedding_size or config.vocab_size,
            padding_index=None,  # as published: the padding token's embedding is trained like any other
            after_embedding=EmbeddingScale if config.input_emb_norm else None,
        )


class LLaDAModelLM(MaskedDiffusionLM):
    """LLaDA as a masked diffusion language model; predicts over all rows of the embedding table."""

    config_class = LLaDAConfig
    backbone_class = LLaDAModel
    right_shift_logits = False
    published_names = (
        ("model.transformer.ff_out.", "lm_head."),
        ("transformer.wte.", "embed_tokens."),
        ("transformer.ln_f.", "norm."),
        ("transformer.blocks.", "layers."),
        (".attn_norm.", ".input_layernorm."),
        (".ff_norm.", ".post_attention_layernorm."),
        (".q_proj.", ".self_attn.q_proj."),
        (".k_proj.", ".self_attn.k_proj."),
        (".v_proj.", ".self_attn.v_proj."),
        (".attn_out.", ".self_attn.o_proj."),
        (".ff_proj.", ".mlp.gate_proj."),
        (".up_proj.", ".mlp.up_proj."),
        (".ff_out.", ".mlp.down_proj."),
    )

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config, head_bias=config.include_bias)

    def predict(self, hidden: Tensor) -> Tensor:
        """Project [..., D] onto the vocabulary, over sqrt(D) if `scale_logits`."""
        logits = super().predict(hidden)
        return logits * self.config.d_model**-0.5 if self.config.scale_logits else logits
