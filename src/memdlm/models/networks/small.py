"""A small dense family for demonstrations and studies on a CPU, an ordinary transformers model.

Two aids make retrieval learnable within a minute: every position sees its direct neighbours before attention
(`token_mixing`), and keys start equal to queries (`tie_query_key_init`), so that equal tokens attract each other from
the first step. `sliding_window` puts text out of reach of attention, for studies of what a memory alone can recall.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from memdlm.errors import ConfigError
from memdlm.models.blocks.layers import Attention, AttentionShape, Block, GatedMLP, SelfInitialising
from memdlm.models.networks.backbone import Backbone, MaskedDiffusionLM


class SmallDLMConfig(PreTrainedConfig):
    """Sizes of the small dense family; `sliding_window` w lets a position see those at most w away (None: all)."""

    model_type = "memdlm_small"
    keys_to_ignore_at_inference: ClassVar[tuple[str, ...]] = ()

    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    sliding_window: int | None = None
    token_mixing: bool = True
    tie_query_key_init: bool = True
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    initializer_range: float = 0.1
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        # transformers does not do this for a class that only declares fields.
        self.validate()


class TokenMixing(SelfInitialising):
    """Depthwise width-3 convolution: each channel sees its left and right neighbour."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(width))
        self.centre = nn.Parameter(torch.empty(width))
        self.right = nn.Parameter(torch.empty(width))

    def initialise(self, config: SmallDLMConfig) -> None:
        """Keep the token itself and add its neighbours with random weights of the same size."""
        init.ones_(self.centre)
        init.normal_(self.left, std=1.0)
        init.normal_(self.right, std=1.0)

    def forward(self, x: Tensor, is_visible: Tensor | None) -> Tensor:
        """Mix [B, L, D]; positions outside `is_visible` [B, L] contribute nothing, so padding cannot leak in."""
        visible = x if is_visible is None else x * is_visible[..., None]
        before = nn.functional.pad(visible, (0, 0, 1, 0))[:, :-1]
        after = nn.functional.pad(visible, (0, 0, 0, 1))[:, 1:]
        return x * self.centre + before * self.left + after * self.right


class SmallDLMLayer(Block):
    """Attention (after token mixing, if any) and a gated feed-forward."""

    def __init__(self, config: SmallDLMConfig, index: int) -> None:
        shape = AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.head_dim,
        )
        super().__init__(config, index, shape, GatedMLP(config.hidden_size, config.intermediate_size))
        self.mixing = TokenMixing(config.hidden_size) if config.token_mixing else None


class SmallDLMModel(Backbone):
    """The small dense family without its vocabulary projection."""

    config_class = SmallDLMConfig
    _no_split_modules = ["SmallDLMLayer"]

    def __init__(self, config: SmallDLMConfig) -> None:
        super().__init__(config)
        self.build(
            SmallDLMLayer,
            rotated=int(config.head_dim * config.partial_rotary_factor) // 2 * 2,
            padding_index=config.pad_token_id,
            sliding_window=config.sliding_window,
            after_embedding=TokenMixing if config.token_mixing else None,
            mixes_positions=config.token_mixing,
        )


class SmallDLM(MaskedDiffusionLM):
    """The small dense family as a masked diffusion language model."""

    config_class = SmallDLMConfig
    backbone_class = SmallDLMModel

    @torch.no_grad()
    def prepare_new(self) -> None:
        """Start keys equal to queries, if the configuration asks for it."""
        if self.config.tie_query_key_init:
            for module in self.modules():
                if isinstance(module, Attention):
                    module.k_proj.weight.copy_(module.q_proj.weight)
