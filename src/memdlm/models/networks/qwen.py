"""The Qwen-shaped families: Dream (7B), SDAR, and A2D (Qwen2, Qwen3 and Llama decoders that look both ways).

One network covers all of them: grouped attention, gated feed-forward, rotation of the whole head. The families differ
in biases, in the norm of queries and keys, and in whether the projection is tied to the embeddings. All names on disk
are the published ones. Nobody here is causal: the caller says who sees whom (`memdlm.models.blocks.masks`).
"""

from typing import Any, ClassVar

from memdlm.errors import ConfigError
from memdlm.models.blocks.layers import AttentionShape, Block, GatedMLP
from memdlm.models.blocks.published import PublishedConfig
from memdlm.models.networks.backbone import Backbone, MaskedDiffusionLM
from memdlm.options import shortened

EXPERTS = ("num_experts", "num_local_experts", "moe_intermediate_size", "n_routed_experts")
"""Fields of configurations with experts instead of a dense feed-forward."""


class QwenConfig(PublishedConfig):
    """What the Qwen-shaped configurations share. Fields as published; dropouts and caches have no effect.

    Raises ConfigError for what no supported network has: scaled rotary positions, sliding windows, several rotary axes,
    experts, other activations.
    """

    qkv_bias: ClassVar[bool] = False
    """Query, key and value have a bias, the output has none (Qwen2)."""
    qk_norm: ClassVar[bool] = False
    """Queries and keys are normalised per head before the rotation (Qwen3)."""

    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 0
    """0 or None: as many as `num_attention_heads`."""
    head_dim: int | None = 0
    """0 or None: `hidden_size` divided by `num_attention_heads`."""
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_theta = _theta(kwargs, self.rope_theta)
        _refuse(kwargs)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        # SDAR's own file asks for one kernel; here the caller chooses, and the function is the same.
        if kwargs.get("attn_implementation") == "flex_attention":
            del kwargs["attn_implementation"]
        super().__post_init__(**kwargs)


def _theta(others: dict[str, Any], stated: float) -> float:
    """Return the base of the rotary frequencies, which files have in one of two places; other rotations are refused."""
    given = {name: others.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, rule in given.items():
        kind = rule.get("rope_type") or rule.get("type") or "default"
        if kind != "default":
            raise ConfigError(f"{name} asks for {kind!r} rotary positions; possible is 'default', or no {name}.")
        others_than_all = rule.get("partial_rotary_factor", 1.0)
        if others_than_all != 1.0:
            raise ConfigError(f"{name}.partial_rotary_factor is {others_than_all!r}; possible is 1.0.")
        stated = float(rule.get("rope_theta") or stated)
    return stated


def _refuse(others: dict[str, Any]) -> None:
    """Raise ConfigError for a field that asks for something that these networks do not have."""
    for name in ("use_sliding_window", "use_mrope"):
        if others.get(name):
            raise ConfigError(f"{name} is {others[name]!r}; possible is false: every layer sees the whole text.")
    kinds = others.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"layer_types is {shortened(kinds)}; possible is 'full_attention' for every layer.")
    for name in EXPERTS:
        if others.get(name):
            raise ConfigError(
                f"{name} is {others[name]!r}: mixtures of experts of this shape (SDAR-30B-A3B) are not supported; "
                "possible are the dense models."
            )
    activation = others.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act is {activation!r}; possible is 'silu'.")
    if others.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor is {others['partial_rotary_factor']!r}; possible is 1.0.")


class DreamConfig(QwenConfig):
    """Dream-v0-7B: a Qwen2.5 decoder that looks both ways; its output at position i - 1 predicts token i."""

    model_type = "Dream"
    published_architectures = ("DreamModel", "DreamBaseModel")
    telling_model_types = ("Dream", "dream")
    qkv_bias = True

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072


class DreamLowerCaseConfig(DreamConfig):
    """The model type that some derivatives of Dream state; reading it gives a `DreamConfig`."""

    model_type = "dream"


class SDARConfig(QwenConfig):
    """SDAR: a Qwen3 decoder that is trained and decoded in blocks which do not see later ones."""

    model_type = "sdar"
    published_architectures = ("SDARForCausalLM", "SDARModel", "SDARMoeForCausalLM")
    telling_model_types = ("sdar", "sdar_moe")
    qk_norm = True

    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    attention_bias: bool = False
    block_size: int | None = None
    """Tokens per block; None: the family's, 4. Files on the hub leave it out and put it into the repository's name."""


class A2DQwen3Config(QwenConfig):
    """A Qwen3 decoder that was converted to look both ways (Tiny-A2D)."""

    model_type = "a2d-qwen3"
    published_architectures = ("A2DQwen3LMHeadModel", "A2DQwen3Model")
    telling_model_types = ("a2d-qwen3",)
    qk_norm = True

    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    attention_bias: bool = False
    block_size: int | None = None
    """Tokens per block of a model that was trained in blocks which do not see later ones; None: it was not."""


class A2DQwen2Config(QwenConfig):
    """A Qwen2 decoder that was converted to look both ways."""

    model_type = "a2d-qwen2"
    published_architectures = ("A2DQwen2LMHeadModel", "A2DQwen2Model")
    telling_model_types = ("a2d-qwen2",)
    qkv_bias = True

    block_size: int | None = None
    """As in `A2DQwen3Config`."""


class A2DLlamaConfig(QwenConfig):
    """A Llama decoder that was converted to look both ways."""

    model_type = "a2d-llama"
    published_architectures = ("A2DLlamaLMHeadModel", "A2DLlamaModel")
    telling_model_types = ("a2d-llama",)

    attention_bias: bool = False
    mlp_bias: bool = False
    block_size: int | None = None
    """As in `A2DQwen3Config`."""


class QwenLayer(Block):
    """Attention and a gated feed-forward."""

    def __init__(self, config: Any, index: int) -> None:
        bias = bool(getattr(config, "attention_bias", False))
        shape = AttentionShape.of(
            config,
            bias=bias or config.qkv_bias,
            out_bias=bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
        )
        bias = bool(getattr(config, "mlp_bias", False))
        super().__init__(config, index, shape, GatedMLP(config.hidden_size, config.intermediate_size, bias=bias))


class QwenModel(Backbone):
    """A Qwen-shaped network without its vocabulary projection."""

    _no_split_modules = ["QwenLayer"]

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config)
        # The published classes hold the padding token's row fixed. In Dream that is the row of EOS, which must learn.
        self.build(QwenLayer, padding_index=None)


class DreamBaseModel(QwenModel):
    """Dream without its vocabulary projection."""

    config_class = DreamConfig


class DreamModel(MaskedDiffusionLM):
    """Dream as a masked diffusion language model."""

    config_class = DreamConfig
    backbone_class = DreamBaseModel
    right_shift_logits = True


class SDARModel(QwenModel):
    """SDAR without its vocabulary projection."""

    config_class = SDARConfig


class SDARForCausalLM(MaskedDiffusionLM):
    """SDAR as a masked diffusion language model. The name is the published one; nothing in it is causal."""

    config_class = SDARConfig
    backbone_class = SDARModel
    right_shift_logits = False


class A2DQwen3Model(QwenModel):
    """A2D of Qwen3 without its vocabulary projection."""

    config_class = A2DQwen3Config


class A2DQwen3LMHeadModel(MaskedDiffusionLM):
    """A2D of Qwen3 as a masked diffusion language model."""

    config_class = A2DQwen3Config
    backbone_class = A2DQwen3Model


class A2DQwen2Model(QwenModel):
    """A2D of Qwen2 without its vocabulary projection."""

    config_class = A2DQwen2Config


class A2DQwen2LMHeadModel(MaskedDiffusionLM):
    """A2D of Qwen2 as a masked diffusion language model."""

    config_class = A2DQwen2Config
    backbone_class = A2DQwen2Model


class A2DLlamaModel(QwenModel):
    """A2D of Llama without its vocabulary projection."""

    config_class = A2DLlamaConfig


class A2DLlamaLMHeadModel(MaskedDiffusionLM):
    """A2D of Llama as a masked diffusion language model."""

    config_class = A2DLlamaConfig
    backbone_class = A2DLlamaModel
