"""The table of families: configuration, classes, names on disk, and what their tokenizers need."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from memdlm.models.backbone import Backbone, MaskedDiffusionLM
from memdlm.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModel, LLaDAMoEModelLM
from memdlm.models.small import SmallDLM, SmallDLMConfig, SmallDLMModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One network family, as users meet it on disk."""

    name: str
    config_class: type[PreTrainedConfig]
    backbone_class: type[Backbone]
    lm_class: type[MaskedDiffusionLM]
    architectures: tuple[str, ...]
    """Names that published configurations give the class, compared without case."""
    mask_token: str
    eot_token: str
    conversions: tuple[Any, ...] = ()
    """How names and tensors on disk become ours; transformers runs them backwards when saving."""


def stacked_experts() -> tuple[WeightConverter, ...]:
    """Fuse one tensor per expert into stacked tensors: gate and up side by side, down alone."""
    return (
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    )


LLADA_MOE = Family(
    name="LLaDA-MoE",
    config_class=LLaDAMoEConfig,
    backbone_class=LLaDAMoEModel,
    lm_class=LLaDAMoEModelLM,
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    mask_token="<|mask|>",
    eot_token="<|role_end|>",
    conversions=stacked_experts(),
)
SMALL = Family(
    name="small",
    config_class=SmallDLMConfig,
    backbone_class=SmallDLMModel,
    lm_class=SmallDLM,
    architectures=("SmallDLM",),
    mask_token="<|mask|>",
    eot_token="<|eot|>",
)

FAMILIES: tuple[Family, ...] = (LLADA_MOE, SMALL)


def register() -> None:
    """Tell transformers' Auto classes about the families; calling it again changes nothing."""
    for family in FAMILIES:
        model_type = family.config_class.model_type
        AutoConfig.register(model_type, family.config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.backbone_class, exist_ok=True)
        AutoModelForMaskedLM.register(family.config_class, family.lm_class, exist_ok=True)
        if family.conversions:
            register_checkpoint_conversion_mapping(model_type, list(family.conversions), overwrite=True)


def family_of(config: PreTrainedConfig) -> Family | None:
    """Return the family whose configuration class `config` is, or None for a foreign model."""
    for family in FAMILIES:
        if type(config) is family.config_class:
            return family
    return None
