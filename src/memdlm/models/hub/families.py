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
from memdlm.models.networks.mdlm import MDLM, MDLMConfig, MDLMModel
from memdlm.models.networks.qwen import (
    A2DLlamaConfig,
    A2DLlamaLMHeadModel,
    A2DLlamaModel,
    A2DQwen2Config,
    A2DQwen2LMHeadModel,
    A2DQwen2Model,
    A2DQwen3Config,
    A2DQwen3LMHeadModel,
    A2DQwen3Model,
    DreamBaseModel,
    DreamConfig,
    DreamLowerCaseConfig,
    DreamModel,
    QwenConfig,
    SDARConfig,
    SDARForCausalLM,
    SDARModel,
)
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
    other_mask_tokens: tuple[str, ...] = ()
    """Further spellings of the mask token, in copies of the published tokenizer."""
    eot_token: str
    block_size: int | None = None
    """Tokens of the absolute blocks in which the family is decoded, which do not see later ones (LLaDA2.x, SDAR).
    None: there are none, and every position sees every other. A configuration's own `block_size` goes first."""
    chat_template: str | None = None
    """Replaces the tokenizer's own template; None keeps that one."""
    spare_template: str | None = None
    """The template of a tokenizer that has none, if its vocabulary has the end of turn."""
    tokenizer: str | None = None
    """Where the tokenizer is if the checkpoint has none (MDLM): a hub repository. It gets the mask token, whose id is
    `mask_row` of the configuration."""
    conversions: tuple[Any, ...] = ()
    """How names and tensors on disk become ours; transformers runs them backwards when saving."""

    writes_in_blocks: bool = False
    """A memory is written under the blocks of decoding, unless told otherwise: the network was trained in blocks, and
    has not seen text that sees all of itself."""

    @property
    def model_type(self) -> str:
        """The name under which transformers knows the configuration."""
        return str(self.config_class.model_type)

    @property
    def right_shift_logits(self) -> bool:
        """Whether the network's output at position i - 1 predicts token i (Dream); the first keeps its own."""
        return bool(self.lm_class.right_shift_logits)

    @property
    def is_block_causal(self) -> bool:
        """Whether the family is decoded in blocks that do not see later ones, unless a configuration says otherwise."""
        return self.block_size is not None


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


CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' and DEFAULT %}"
    "{{ '<|im_start|>system\n' + DEFAULT + '<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat format of Qwen; `DEFAULT` stands for the system message of a conversation that has none."""
QWEN_TEMPLATE = CHATML.replace("DEFAULT", "''")
DREAM_TEMPLATE = CHATML.replace("DEFAULT", "'You are a helpful assistant.'")
NO_THINKING = "{%- if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}"
"""Put before a template of Qwen3, so that answers begin behind an empty thinking block unless the caller asks."""


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
    block_size=32,
    mask_token="<|mask|>",
    eot_token="<|role_end|>",
    conversions=(*renamings(LLaDA2MoeModelLM.published_names), *stacked_experts()),
)
DREAM = Family(
    name="Dream",
    config_class=DreamConfig,
    backbone_class=DreamBaseModel,
    lm_class=DreamModel,
    other_configs=(DreamLowerCaseConfig,),
    mask_token="<|mask|>",
    eot_token="<|im_end|>",
    spare_template=DREAM_TEMPLATE,
)
SDAR = Family(
    name="SDAR",
    config_class=SDARConfig,
    backbone_class=SDARModel,
    lm_class=SDARForCausalLM,
    block_size=4,
    writes_in_blocks=True,
    mask_token="<|MASK|>",
    other_mask_tokens=("<MASK>",),
    eot_token="<|im_end|>",
    spare_template=QWEN_TEMPLATE,
)
A2D_QWEN2 = Family(
    name="A2D-Qwen2",
    config_class=A2DQwen2Config,
    backbone_class=A2DQwen2Model,
    lm_class=A2DQwen2LMHeadModel,
    writes_in_blocks=True,
    mask_token="<|mask|>",
    eot_token="<|im_end|>",
    spare_template=QWEN_TEMPLATE,
)
A2D_QWEN3 = Family(
    name="A2D-Qwen3",
    config_class=A2DQwen3Config,
    backbone_class=A2DQwen3Model,
    lm_class=A2DQwen3LMHeadModel,
    writes_in_blocks=True,
    mask_token="<|mask|>",
    eot_token="<|im_end|>",
    spare_template=QWEN_TEMPLATE,
)
A2D_LLAMA = Family(
    name="A2D-Llama",
    config_class=A2DLlamaConfig,
    backbone_class=A2DLlamaModel,
    lm_class=A2DLlamaLMHeadModel,
    writes_in_blocks=True,
    mask_token="<|mask|>",
    eot_token="<|eot_id|>",
)
MDLM_OWT = Family(
    name="MDLM",
    config_class=MDLMConfig,
    backbone_class=MDLMModel,
    lm_class=MDLM,
    mask_token="<|mask|>",
    eot_token="<|endoftext|>",
    tokenizer="gpt2",
    conversions=renamings(MDLM.published_names),
)
SMALL = Family(
    name="small",
    config_class=SmallDLMConfig,
    backbone_class=SmallDLMModel,
    lm_class=SmallDLM,
    mask_token="<|mask|>",
    eot_token="<|eot|>",
)

FAMILIES: tuple[Family, ...] = (LLADA, LLADA_MOE, LLADA2, DREAM, SDAR, A2D_QWEN2, A2D_QWEN3, A2D_LLAMA, MDLM_OWT, SMALL)


def register() -> None:
    """Tell transformers' Auto classes about the families; calling it again changes nothing."""
    for family in FAMILIES:
        for config_class in (family.config_class, *family.other_configs):
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.backbone_class, exist_ok=True)
        AutoModelForMaskedLM.register(family.config_class, family.lm_class, exist_ok=True)
        if family.conversions:
            register_checkpoint_conversion_mapping(family.model_type, list(family.conversions), overwrite=True)


def block_size_of(config: object) -> int | None:
    """Return how many tokens a model of this configuration decodes together in blocks that do not see later ones.

    None: it has no such blocks. The configuration's own `block_size` (SDAR, A2D) goes before the family's.
    """
    family = family_of(config)
    if family is None:
        return None
    stated: int | None = getattr(config, "block_size", None) if isinstance(config, QwenConfig) else None
    return stated or family.block_size


def decoding_pattern(config: object, block: int | None = None) -> AttentionPattern:
    """Return the pattern under which a model of this configuration decodes: blocks of `block` (LLaDA2.x), or full."""
    own = block_size_of(config)
    return Full() if own is None else BlockCausal(block or own)


def writing_pattern(config: object) -> AttentionPattern:
    """Return the pattern under which a memory is written unless told otherwise: full, or that of decoding."""
    family = family_of(config)
    return decoding_pattern(config) if family is not None and family.writes_in_blocks else Full()


def shifts_logits(config: object) -> bool:
    """Whether a model of this configuration predicts token i at position i - 1 (Dream); False for a foreign one."""
    family = family_of(config)
    return family is not None and family.right_shift_logits


def family_of(config: object) -> Family | None:
    """Return the family whose configuration class `config` is, or None for a foreign model."""
    for family in FAMILIES:
        if type(config) is family.config_class:
            return family
    return None
