"""Tokenize a dataset once, for many training runs."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from memdlm.data.encoding import EncodingOptions, check_contexts
from memdlm.data.preprocess import preprocess
from memdlm.data.sources import load_conversations, unused
from memdlm.files import name_under_base
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.options import option
from memdlm.workflows.display import Display
from memdlm.workflows.runs.datasets import own_words
from memdlm.workflows.runs.options import BASE_MODELS


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(EncodingOptions):
    """What is tokenized, how, and where it is written."""

    model: str = option(MISSING, "Folder or hub name whose tokenizer and chat template are used.")
    dataset_args: str = option(
        MISSING,
        "Datasets: hub names, files (.jsonl, .json, .parquet, .csv, .tsv) or saved folders. Join several "
        "with +, cut one with name[train:100].",
    )
    output_dir: str = option(MISSING, "Folder to write, e.g. data/sft/llada_moe/longalpaca.")
    num_proc: int = option(1, "Number of processes that tokenize.", minimum=1, maximum=1024)
    overwrite: bool = option(False, "Replace what is in output_dir.")


def run_preprocessing(options: PreprocessOptions, display: Display) -> dict[str, Any]:
    """Write the preprocessed folder and return its manifest; an interrupted run continues where it stopped."""
    tokenizer = load_tokenizer(name_under_base(options.model, BASE_MODELS))
    splits = load_conversations(options.dataset_args, options.columns)
    check_contexts(list(splits.values()), options.context_column, "any split")
    for line in [*unused(splits.values()), *own_words(splits, tokenizer, options.context_column)]:
        display.say(line)
    with display.bar("tokenizing", "tokenizing", sum(map(len, splits.values()))) as advance:
        return preprocess(
            splits,
            options.dataset_args,
            tokenizer,
            options.encoding,
            Path(options.output_dir),
            num_proc=options.num_proc,
            overwrite=options.overwrite,
            advance=advance,
        )
