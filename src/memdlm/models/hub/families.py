"""The table of families: configuration, classes, names on disk, and what their tokenizers need."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from memdlm.models.blocks.masks import AttentionPattern, BlockCausal, Full
from memdlm.models.blocks.names import renamings
from memdlm.models.blocks.stacking import stacked_experts
from memdlm.models.networks.backbone import Backbone, MaskedDiffusionLM
from memdlm.models.networks.llada import LLaDAConfig, LLaDAModel, LLaDAModelLM
from memdlm.models.networks.llada2 import (
    LLaDA2Moe21Config,
    LLaDA2MoeConfig,
    LLaDA2MoeModel,
    LLaDA2MoeModelLM,
    LLaDA21MoeConfig,
)
from memdlm.models.networks.llada_moe import LLaDAMoEConfig, LLaDAMoEModel, LLaDAMoEModelLM
from memdlm.models.networks.small import SmallDLM, SmallDLMConfig, SmallDLMModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One network family, as users meet it on disk."""

    name: str
    config_class: type[PreTrainedConfig]
    backbone_class: type[Backbone]
    lm_class: type[MaskedDiffusionLM]
    other_configs: tuple[type[PreTrainedConfig], ...] = ()
    """Configurations that give the family further model types."""
    mask_token: str
    eot_token: str
    is_block_causal: bool = False
    """Decoded in absolute blocks that do not see later ones (LLaDA2.x)."""
    chat_template: str | None = None
    """Replaces the tokenizer's own template; None keeps that one."""
    conversions: tuple[Any, ...] = ()
    """How names and tensors on disk become ours; transformers runs them backwards when saving."""

    @property
    def model_type(self) -> str:
        """The name under which transformers knows the configuration."""
        return str(self.config_class.model_type)


LLADA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


LLADA = Family(
    name="LLaDA",
    config_class=LLaDAConfig,
    backbone_class=LLaDAModel,
    lm_class=LLaDAModelLM,
    mask_token="<|mdm_mask|>",
    eot_token="<|eot_id|>",
    chat_template=LLADA_TEMPLATE,
    conversions=renamings(LLaDAModelLM.published_names),
)
LLADA_MOE = Family(
    name="LLaDA-MoE",
    config_class=LLaDAMoEConfig,
    backbone_class=LLaDAMoEModel,
    lm_class=LLaDAMoEModelLM,
    mask_token="<|mask|>",
    eot_token="<|role_end|>",
    conversions=stacked_experts(),
)
LLADA2 = Family(
    name="LLaDA2",
    config_class=LLaDA2MoeConfig,
    backbone_class=LLaDA2MoeModel,
    lm_class=LLaDA2MoeModelLM,
    other_configs=(LLaDA21MoeConfig, LLaDA2Moe21Config),
    is_block_causal=True,
    mask_token="<|mask|>",
    eot_token="<|role_end|>",
    conversions=(*renamings(LLaDA2MoeModelLM.published_names), *stacked_experts()),
)
SMALL = Family(
    name="small",
    config_class=SmallDLMConfig,
    backbone_class=SmallDLMModel,
    lm_class=SmallDLM,
    mask_token="<|mask|>",
    eot_token="<|eot|>",
)

FAMILIES: tuple[Family, ...] = (LLADA, LLADA_MOE, LLADA2, SMALL)


def register() -> None:
    """Tell transformers' Auto classes about the families; calling it again changes nothing."""
    for family in FAMILIES:
        for config_class in (family.config_class, *family.other_configs):
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.backbone_class, exist_ok=True)
        AutoModelForMaskedLM.register(family.config_class, family.lm_class, exist_ok=True)
        if family.conversions:
            register_checkpoint_conversion_mapping(family.model_type, list(family.conversions), overwrite=True)


BLOCK = 32
"""Tokens that block-causal families decode together, unless told otherwise."""


def decoding_pattern(config: object, block: int | None = None) -> AttentionPattern:
    """Return the pattern under which a model of this configuration decodes: blocks of `block` (LLaDA2.x), or full."""
    family = family_of(config)
    return BlockCausal(block or BLOCK) if family is not None and family.is_block_causal else Full()


def family_of(config: object) -> Family | None:
    """Return the family whose configuration class `config` is, or None for a foreign model."""
    for family in FAMILIES:
        if type(config) is family.config_class:
            return family
    return None
