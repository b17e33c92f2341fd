"""Which model decodes, as options, and how it is loaded with its tokenizer."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from memdlm.errors import ConfigError
from memdlm.inference.config import GenerationConfig
from memdlm.models import load_model, load_tokenizer
from memdlm.models.hub.devices import AUTO, DEVICE_HELP, DTYPE_HELP
from memdlm.models.hub.loading import DTYPES
from memdlm.models.hub.resolution import published_fields, table_rows
from memdlm.models.lora.files import base_of_adapter, is_adapter
from memdlm.options import option, validate


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is used, and how it is loaded."""

    model: str | None = option(None, "Folder or hub name of the model and its tokenizer.")
    adapter: str | None = option(None, "Folder or hub name of an outer LoRA adapter.")
    dtype: str = option(AUTO, DTYPE_HELP, choices=(AUTO, *DTYPES))
    device: str = option(AUTO, DEVICE_HELP)
    load_in_4bit: bool = option(False, "Quantise the model to 4 bits (nf4) while loading.")
    attn_implementation: str | None = option(None, "Attention implementation: sdpa or eager; unset: sdpa.")

    def __post_init__(self) -> None:
        validate(self)
        if self.model is None:
            raise ConfigError("--model is missing: name a folder or a hub repository.")


def check_vocabulary(options: ModelOptions, config: GenerationConfig) -> None:
    """Raise ConfigError if `config` names tokens that the model lacks by its configuration (no weights are needed)."""
    name = str(options.model)
    if is_adapter(name):
        name = base_of_adapter(name)
    rows = table_rows(published_fields(name, optional=True) or {})
    if isinstance(rows, int):
        config.check_vocabulary(rows)


def loaded(options: ModelOptions) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load model and tokenizer."""
    name = str(options.model)
    model = load_model(
        name,
        dtype=options.dtype,
        device=options.device,
        load_in_4bit=options.load_in_4bit,
        adapter=options.adapter,
        attn_implementation=options.attn_implementation,
    )
    tokenizer = load_tokenizer(name)
    return model, tokenizer
