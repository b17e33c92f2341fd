"""MDLM (kuleshov-group/mdlm-owt, arXiv 2406.07524): a diffusion transformer of 0.2B parameters, trained on OpenWebText.

Published files are read unedited and written back under their names. The network follows the SUBS parameterization of
the paper: the mask token is never predicted. What the published code does beside that, tokens that are known are
carried over, is the same as not asking for them, as losses, likelihoods and samplers here do.
"""

from typing import Any

import torch
from torch import Tensor

from memdlm.errors import CheckpointError, ConfigError
from memdlm.models.blocks.dit import ConditionedNorm, Conditioning, ConstantNoiseLevel, DiTBlock, StoredFrequencies
from memdlm.models.blocks.published import PublishedConfig
from memdlm.models.networks.backbone import Backbone, MaskedDiffusionLM

NEVER = -1e6
"""The logit of the mask token, as published. It is finite, so that entropies and divergences are, too."""


class MDLMConfig(PublishedConfig):
    """Fields as published; transformers' usual names are aliases. `dropout` has no effect.

    Raises ConfigError for a network that is told its noise level (`time_conditioning`).
    """

    model_type = "mdlm"
    published_architectures = ("MDLM",)
    telling_model_types = ("mdlm",)
    attribute_map = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    vocab_size: int = 50258
    hidden_dim: int = 768
    cond_dim: int = 128
    n_blocks: int = 12
    n_heads: int = 12
    model_length: int = 1024
    dropout: float = 0.1
    time_conditioning: bool = False
    mask_token_id: int | None = None
    """None: the last row of the embedding table. The tokenizer is GPT-2's, which has no mask token of its own."""
    initializer_range: float = 0.02
    adaln_zero: bool = True
    """A new network begins with modulations, gates and a vocabulary projection of 0, as published."""
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.time_conditioning:
            raise ConfigError(
                "time_conditioning is True: the network is told its noise level, and nothing here tells it. Possible "
                "is false, as in mdlm-owt."
            )
        if self.hidden_dim % self.n_heads or self.hidden_dim // self.n_heads % 2:
            raise ConfigError(
                f"hidden_dim {self.hidden_dim} is not a multiple of n_heads {self.n_heads} that gives heads of even "
                "width, which rotary positions need."
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(f"mask_token_id {self.mask_token_id} is not below vocab_size {self.vocab_size}.")
        # Without an effect in the published code, which never ties.
        self.tie_word_embeddings = False
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_dim // self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """As many as there are heads."""
        return self.n_heads

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward."""
        return 4 * self.hidden_dim

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return 10000.0

    @property
    def mask_row(self) -> int:
        """The id of the mask token."""
        return self.vocab_size - 1 if self.mask_token_id is None else self.mask_token_id


class MDLMModel(Backbone):
    """MDLM without its vocabulary projection."""

    config_class = MDLMConfig
    _no_split_modules = ["DiTBlock"]

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.build(DiTBlock, norm=ConditionedNorm(config.hidden_dim, config.cond_dim))
        self.sigma_map = ConstantNoiseLevel(config.cond_dim)
        self.rotary_emb = StoredFrequencies(config.head_dim, config.rope_theta)
        self.post_init()

    def condition(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the condition [1, C] of the one noise level that there is."""
        return (self.sigma_map(hidden),)


class MDLM(MaskedDiffusionLM):
    """MDLM as a masked diffusion language model. The logit of the mask token is `NEVER`."""

    config_class = MDLMConfig
    backbone_class = MDLMModel
    right_shift_logits = False
    published_names = (
        ("backbone.output_layer.linear.", "lm_head."),
        ("backbone.", "model."),
        ("vocab_embed.embedding", "embed_tokens.weight"),
        ("output_layer.norm_final.", "norm."),
        ("output_layer.adaLN_modulation.", "norm.modulation."),
        ("blocks.", "layers."),
        (".attn_qkv.", ".self_attn.query_key_value."),
        (".attn_out.", ".self_attn.o_proj."),
        (".norm1.", ".input_layernorm."),
        (".norm2.", ".post_attention_layernorm."),
        (".mlp.0.", ".mlp.up_proj."),
        (".mlp.2.", ".mlp.down_proj."),
        (".adaLN_modulation.", ".modulation."),
    )
    _keys_to_ignore_on_load_missing = {r"rotary_emb\.inv_freq"}
    _keep_in_fp32_modules_strict = {"inv_freq"}

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config, head_bias=True)

    def predict(self, hidden: Tensor) -> Tensor:
        """Project [..., D] onto the vocabulary; the mask token is not among the predictions."""
        logits = super().predict(hidden)
        # In place: a linear layer does not keep its output for the backward pass.
        logits[..., self.config.mask_row] = max(NEVER, torch.finfo(logits.dtype).min / 2)
        return logits

    @torch.no_grad()
    def prepare_new(self) -> None:
        """Begin as published: every block adds nothing, and every token is as likely as any other."""
        if self.config.adaln_zero:
            for module in self.model.modules():
                if isinstance(module, Conditioning) and module not in self.model.sigma_map.mlp:
                    module.zero()
            self.lm_head.weight.zero_()
            self.lm_head.bias.zero_()

    def check_loaded(self, name: str) -> None:
        """Raise CheckpointError for stored rotary frequencies that are not those of the published network."""
        if not self.model.rotary_emb.is_ours():
            raise CheckpointError(
                f"{name}: rotary_emb.inv_freq holds other frequencies than those of base {self.config.rope_theta:g}, "
                "which every published MDLM has. Rotary positions of another base are not supported."
            )
