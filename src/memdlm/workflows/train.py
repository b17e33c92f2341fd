"""A training run from files: load, encode, train, save."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from memdlm.data.chat import TRAIN_TURNS, encode_records
from memdlm.data.collate import SUPERVISE_PADDING, Collator, drop_untargeted
from memdlm.data.records import read_records
from memdlm.errors import ConfigError, DataError
from memdlm.files import make_folder
from memdlm.models.loading import load_model
from memdlm.models.tokenizers import load_tokenizer
from memdlm.options import option, validate
from memdlm.training.arguments import TrainingArguments
from memdlm.training.trainer import MemDLMTrainer

TRUNCATIONS = ("filter", "right")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is trained."""

    model: str = option(MISSING, "Folder or hub name of the model and its tokenizer.")
    dtype: str = option("auto", "auto, float32, bfloat16, float16 or float64.")
    attn_implementation: str | None = option(None, "sdpa or eager; unset: sdpa.")

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What it is trained on."""

    dataset_args: str = option(
        MISSING, "A .jsonl, .json or .parquet file, or a saved dataset, with messages or prompt/response."
    )
    eval_dataset_args: str | None = option(None, "The same, for evaluation; unset: none.")
    max_length: int = option(1024, "Longest row, in tokens.", minimum=1)
    truncation: str = option(
        "filter", "Rows longer than max_length are left out (filter) or keep their start (right).", choices=TRUNCATIONS
    )
    mask_prompt_loss: bool = option(True, "Never mask, and never score, what is not an answer.")
    train_turns: str = option("last", "Which assistant turns are learned.", choices=TRAIN_TURNS)
    supervise_padding: str = option(
        "all", "How much of the padding (EOS) is learned, so that answers end.", choices=SUPERVISE_PADDING
    )

    def __post_init__(self) -> None:
        validate(self)


def run_training(model_options: ModelOptions, data_options: DataOptions, arguments: TrainingArguments) -> Path:
    """Train as told and leave the final weights and tokenizer in `arguments.output_dir`, which is returned.

    Everything that can be wrong with the data is found before the first step. Raises DataError, ConfigError or
    CheckpointError.
    """
    out = Path(arguments.output_dir)
    make_folder(out)
    tokenizer = load_tokenizer(model_options.model)
    rows = _rows(data_options.dataset_args, data_options, tokenizer)
    held_out = data_options.eval_dataset_args
    if held_out is None and arguments.eval_strategy != "no":
        raise ConfigError(
            f"eval_strategy={arguments.eval_strategy!s} needs eval_dataset_args; name a dataset, or set it to no."
        )
    model = load_model(
        model_options.model, dtype=model_options.dtype, attn_implementation=model_options.attn_implementation
    )
    trainer = MemDLMTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=None if held_out is None else _rows(held_out, data_options, tokenizer),
        data_collator=Collator(tokenizer.pad_token_id, data_options.supervise_padding),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model(str(out))
    # The log, which `memdlm report` reads, also where no checkpoint was wanted.
    trainer.save_state()
    return out


def _rows(path: str, options: DataOptions, tokenizer: Any) -> list[Mapping[str, list[int]]]:
    encoded = encode_records(
        read_records(path), tokenizer, train_turns=options.train_turns, mask_prompt_loss=options.mask_prompt_loss
    )
    rows: list[Mapping[str, list[int]]] = []
    for each in encoded:
        if len(each.input_ids) > options.max_length and options.truncation == "filter":
            continue
        length = options.max_length
        rows.append({"input_ids": each.input_ids[:length], "labels": each.labels[:length]})
    kept, _ = drop_untargeted(rows)
    if not kept:
        raise DataError(
            f"dataset: of the {len(encoded)} rows of {path!r} none has a token to learn within max_length "
            f"{options.max_length}; raise it."
        )
    return kept
