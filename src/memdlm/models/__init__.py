"""ids -> hidden states -> logits: the network families, their loading, and the border to the diffusion mathematics."""

from memdlm.models.blocks.masks import AttentionPattern, BlockCausal, BlockDiffusion, Full
from memdlm.models.border.block_diffusion import BlockDiffusionDenoiser
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.hub.families import FAMILIES, Family, family_of, register
from memdlm.models.hub.loading import build_model, load_model, model_skeleton
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.models.lora.adapters import LoRAOptions, add_outer_lora, merge_outer_adapter
from memdlm.models.lora.files import load_outer_adapter, save_outer_adapter
from memdlm.models.networks.llada import LLaDAConfig, LLaDAModel, LLaDAModelLM
from memdlm.models.networks.llada2 import LLaDA2MoeConfig, LLaDA2MoeModel, LLaDA2MoeModelLM
from memdlm.models.networks.llada_moe import LLaDAMoEConfig, LLaDAMoEModel, LLaDAMoEModelLM
from memdlm.models.networks.mdlm import MDLM, MDLMConfig
from memdlm.models.networks.qwen import (
    A2DLlamaConfig,
    A2DLlamaLMHeadModel,
    A2DQwen2Config,
    A2DQwen2LMHeadModel,
    A2DQwen3Config,
    A2DQwen3LMHeadModel,
    DreamConfig,
    DreamModel,
    SDARConfig,
    SDARForCausalLM,
)
from memdlm.models.networks.small import SmallDLM, SmallDLMConfig, SmallDLMModel

__all__ = [
    "FAMILIES",
    "MDLM",
    "A2DLlamaConfig",
    "A2DLlamaLMHeadModel",
    "A2DQwen2Config",
    "A2DQwen2LMHeadModel",
    "A2DQwen3Config",
    "A2DQwen3LMHeadModel",
    "AttentionPattern",
    "BlockCausal",
    "BlockDiffusion",
    "BlockDiffusionDenoiser",
    "DreamConfig",
    "DreamModel",
    "Family",
    "Full",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModel",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModel",
    "LLaDAMoEModelLM",
    "LLaDAModel",
    "LLaDAModelLM",
    "LoRAOptions",
    "MDLMConfig",
    "ModelDenoiser",
    "SDARConfig",
    "SDARForCausalLM",
    "SmallDLM",
    "SmallDLMConfig",
    "SmallDLMModel",
    "add_outer_lora",
    "build_model",
    "family_of",
    "load_model",
    "load_outer_adapter",
    "load_tokenizer",
    "merge_outer_adapter",
    "model_skeleton",
    "register",
    "save_outer_adapter",
]
