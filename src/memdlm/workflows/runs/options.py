"""The options of training runs, apart from those of `TrainingArguments` and of a new adapter."""

import dataclasses
from dataclasses import MISSING, dataclass

from memdlm.data.collate import SUPERVISE_PADDING
from memdlm.data.encoding import TRUNCATIONS, EncodingOptions
from memdlm.errors import ConfigError
from memdlm.files import name_under_base
from memdlm.memory.config import OuterConfig
from memdlm.models.hub.devices import AUTO, DTYPE_HELP
from memdlm.models.hub.loading import DTYPES
from memdlm.models.lora.adapters import LoRAOptions
from memdlm.options import option, validate

BASE_MODELS = "BASE_MODELS_DIR"
"""Environment variable: the folder in which models are looked for before the hub."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is trained."""

    model: str = option(MISSING, "Folder or hub name of the model and its tokenizer.")
    dtype: str = option(AUTO, DTYPE_HELP, choices=(AUTO, *DTYPES))
    attn_implementation: str | None = option(None, "Attention implementation: sdpa or eager; unset: sdpa.")
    load_in_4bit: bool = option(False, "Quantise the frozen base model to 4 bits (nf4, double quantisation).")
    adapter: str | None = option(
        None, "Folder or hub name of an outer LoRA to train further; it keeps its rank and targets."
    )
    lora: bool = option(False, "Train a new outer LoRA instead of all weights.")

    def __post_init__(self) -> None:
        validate(self)
        if self.lora and self.adapter is not None:
            raise ConfigError(f"lora=True and adapter={self.adapter!r}: train a new adapter or that one, not both.")
        if self.load_in_4bit and not self.has_adapter:
            raise ConfigError(
                "load_in_4bit=True without an adapter: 4-bit weights cannot be trained. Add lora=True, or name an "
                "adapter."
            )

    @property
    def has_adapter(self) -> bool:
        """Whether an outer adapter is trained rather than all weights."""
        return self.lora or self.adapter is not None

    @property
    def path(self) -> str:
        """Return where the model is: below BASE_MODELS_DIR if it is there, else as named."""
        return name_under_base(self.model, BASE_MODELS)


def refuse_idle(model: ModelOptions, lora: LoRAOptions) -> None:
    """Raise ConfigError for an option of a new adapter when no new adapter is trained."""
    for field in dataclasses.fields(LoRAOptions):
        value = getattr(lora, field.name)
        if not model.lora and value != field.default:
            raise ConfigError(
                f"{field.name}={value!r} has no effect without lora=True; add it, or leave {field.name} out."
            )


@dataclass(frozen=True, kw_only=True)
class DataOptions(EncodingOptions):
    """The data of a run."""

    dataset_args: str = option(
        MISSING,
        "Datasets: hub names, files (.jsonl, .json, .parquet, .csv, .tsv) or saved folders. Join several "
        "with +, cut one with name[train:100].",
    )
    eval_dataset_args: str | None = option(
        None, "Datasets to evaluate on; unset: the validation or test split of dataset_args, if evaluation is on."
    )
    eval_optional: bool = option(
        False, "Train without evaluation if evaluation is on and there is no data for it; this is then said."
    )
    load_preprocessed_data: bool = option(False, "Train on what memdlm preprocess wrote for these datasets.")
    preprocessed_dir: str = option("data", "Folder in which preprocessed data is looked for.")
    num_proc: int = option(1, "Number of processes that tokenize.", minimum=1, maximum=1024)
    max_length: int = option(1024, "Maximum length of a row, in tokens.", minimum=1)
    truncation: str = option(
        "filter",
        "What happens to rows longer than max_length. filter: they are left out; right: their first tokens are kept.",
        choices=TRUNCATIONS,
    )
    supervise_padding: str = option(
        "all",
        "How much of the padding (EOS) is learned, so that the model learns to end its answers. block: up to the end "
        "of the row's last block (with block_size).",
        choices=SUPERVISE_PADDING,
    )


def refuse_unread_context(data: DataOptions, memory: OuterConfig | None) -> None:
    """Raise ConfigError for contexts that are not written, and for a write without contexts."""
    source = None if memory is None else memory.write_source
    if source == "context" and data.context_column is None:
        raise ConfigError("mem_write_source='context' needs context_column: the column with the text to write.")
    if data.context_column is not None and source != "context":
        raise ConfigError(
            f"context_column={data.context_column!r} has no effect without mem_enabled=True and "
            "mem_write_source=context; set them, or leave it out."
        )


def refuse_endless_blocks(data: DataOptions, block_size: int | None) -> None:
    """Raise ConfigError for padding up to the end of blocks that there are none of."""
    if data.supervise_padding == "block" and block_size is None:
        raise ConfigError(
            "supervise_padding='block' has no effect without block_size; set it, or choose another of "
            f"{', '.join(SUPERVISE_PADDING[:-1])}."
        )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run starts."""

    resume: str = option(
        "never",
        "never: start anew; latest: continue from the newest complete checkpoint in output_dir, if there "
        "is one; or the path of a checkpoint.",
    )
    resume_changed: bool = option(
        False, "Resume even if options or data that change the result differ from those of the interrupted run."
    )
    resume_without: str | None = option(
        None,
        "States that start anew when the run is resumed, comma-separated: optimizer, scheduler, rng, "
        "scaler, memory. Unset: the checkpoint must have all of them.",
    )
    overwrite_output_dir: bool = option(False, "Delete the checkpoints of an earlier run in output_dir.")
    dry_run: bool = option(False, "Print the configuration, sizes and step counts, and stop; no weights are loaded.")

    def __post_init__(self) -> None:
        validate(self)
        if self.resume != "never" and self.overwrite_output_dir:
            raise ConfigError(f"resume={self.resume!r} and overwrite_output_dir=True contradict each other.")
