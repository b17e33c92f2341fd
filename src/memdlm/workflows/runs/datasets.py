"""Load the rows for a run: from preprocessed folders, or tokenized now."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdlm.data.encoding import Counts, TokenRows, check_contexts, context_lengths, encode_all, fit
from memdlm.data.manifest import tokenizer_state
from memdlm.data.preprocess import load_preprocessed
from memdlm.data.sources import evaluation_split, load_conversations, source_state, unused
from memdlm.data.vocabulary import looked_at, unknown_in_conversations
from memdlm.errors import ConfigError, DataError, did_you_mean
from memdlm.memory.config import MemoryConfig
from memdlm.training.arguments import TrainingArguments
from memdlm.training.outer import refuse_bare_rows
from memdlm.training.rows import require_context
from memdlm.training.tracking import NO_CONTEXT, bucket_names
from memdlm.workflows.display import Display
from memdlm.workflows.runs.options import DataOptions

TRAIN, TEST = "train", "test"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The data that a run is trained and evaluated on."""

    train: TokenRows
    evaluation: TokenRows | None
    counts: dict[str, Counts]
    """Counts by split."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Identifies the data: manifests of preprocessed folders, or the same facts about data tokenized now."""

    def check(self, arguments: TrainingArguments) -> None:
        """Raise ConfigError for rows that `arguments` cannot train on, and for a best metric that is not measured."""
        memory = arguments.memory
        for split, counts in self.counts.items():
            if memory is not None:
                refuse_bare_rows(memory, counts.without_context, f"the {counts.kept} rows of {split}")
        name = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
        if self.evaluation is not None and arguments.load_best_model_at_end and name not in self._metrics(memory):
            raise ConfigError(
                f"metric_for_best_model={arguments.metric_for_best_model!r} is not measured on these data; possible: "
                f"{', '.join(self._metrics(memory))}.{did_you_mean(name, self._metrics(memory))}"
            )

    def _metrics(self, memory: MemoryConfig | None) -> list[str]:
        """Return the names of what an evaluation on these data measures."""
        names = ["loss", "nll", "ppl", *bucket_names("nll")]
        counts = self.counts[TEST]
        if memory is not None and counts.without_context < counts.kept:
            names += ["nll_memory", NO_CONTEXT] if counts.without_context else ["nll_memory"]
        return names


def load_data(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, *, evaluates: bool, display: Display
) -> RunData:
    """Load the data of a run. All errors in the data are found here, before any weights are loaded.

    Raises DataError for data that is missing, malformed, made for another tokenizer or without anything to learn,
    and ConfigError when evaluation is on but there is nothing to evaluate on, unless `eval_optional` is on.
    """
    splits, manifest = _encoded(options, tokenizer, evaluates=evaluates, display=display)
    if TRAIN not in splits:
        raise DataError(f"dataset_args: {options.dataset_args!r} has no train split; it has {', '.join(splits)}.")
    held_out = splits.get(evaluation_split(splits) or "")
    if options.eval_dataset_args is not None:
        others = replace(options, dataset_args=options.eval_dataset_args)
        found, more = _encoded(others, tokenizer, evaluates=None, display=display)
        name = evaluation_split(found)
        if name is None and len(found) > 1:
            raise DataError(
                f"eval_dataset_args: {options.eval_dataset_args!r} has no validation or test split: {', '.join(found)}."
            )
        held_out = found[name] if name is not None else next(iter(found.values()))
        manifest = {**manifest, "evaluation": more}
    if evaluates and held_out is None:
        _without_evaluation(options, display)
    train, counts = _fitting(splits[TRAIN], options, TRAIN)
    evaluation, eval_counts = (None, None) if held_out is None else _fitting(held_out, options, TEST)
    all_counts = {TRAIN: counts} if eval_counts is None else {TRAIN: counts, TEST: eval_counts}
    return RunData(train=train, evaluation=evaluation, counts=all_counts, manifest=manifest)


def _without_evaluation(options: DataOptions, display: Display) -> None:
    """Say that nothing is evaluated, or raise ConfigError if evaluation must be possible."""
    remedy = "name eval_dataset_args, or cut a test split as in name[train:900,test:100]"
    if not options.eval_optional:
        raise ConfigError(
            f"eval_strategy is on, but there is nothing to evaluate on: {remedy}, or set eval_strategy to no."
        )
    display.say(f"nothing is evaluated: {options.dataset_args} has no split for it. To evaluate, {remedy}.")


def _encoded(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, *, evaluates: bool | None, display: Display
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the used splits and what identifies the data. `evaluates` None: the dataset is for evaluation only."""
    if options.load_preprocessed_data:
        found, manifests = load_preprocessed(
            options.dataset_args,
            tokenizer,
            options.encoding,
            Path(options.preprocessed_dir),
            may_be_bare=evaluates is None,
        )
        return _used(found, options, evaluates, display), manifests
    splits = _used(load_conversations(options.dataset_args, options.columns), options, evaluates, display)
    if evaluates is not None and TRAIN in splits:
        check_contexts([splits[TRAIN]], options.context_column, TRAIN)
    for line in [*unused(splits.values()), *own_words(splits, tokenizer, options.context_column)]:
        display.say(line)
    encoded = {}
    for split, conversations in splits.items():
        with display.bar("data", f"tokenizing {split}", len(conversations)) as advance:
            encoded[split] = encode_all(
                conversations, tokenizer, options.encoding, num_proc=options.num_proc, advance=advance
            )
    return encoded, {"sources": source_state(options.dataset_args), "tokenizer": tokenizer_state(tokenizer)}


def own_words(
    splits: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, context_column: str | None
) -> Iterator[str]:
    """Yield a warning for every split with many words that the tokenizer does not have."""
    for split, conversations in splits.items():
        found = unknown_in_conversations(tokenizer, conversations, context_column)
        if found.are_many:
            count = len(conversations)
            yield found.line(f"{split}, {len(looked_at(count))} of {count} conversations")


def _used(splits: dict[str, Any], options: DataOptions, evaluates: bool | None, display: Display) -> dict[str, Any]:
    """Return the splits that a run uses, and print the others."""
    wanted: Collection[str | None] = (TRAIN, evaluation_split(splits) if evaluates else None)
    if evaluates is None:
        wanted = (evaluation_split(splits),) if evaluation_split(splits) is not None else tuple(splits)
    if evaluates and options.eval_dataset_args is not None:
        wanted = (TRAIN,)
    others = {split: len(rows) for split, rows in splits.items() if split not in wanted}
    # Without a train split, the caller raises an error.
    if others and (evaluates is None or TRAIN in splits):
        words = ", ".join(f"{split} ({count} rows)" for split, count in others.items())
        display.say(f"{options.dataset_args}: splits that are not used: {words}")
        return {split: rows for split, rows in splits.items() if split in wanted}
    return splits


def _fitting(rows: Any, options: DataOptions, split: str) -> tuple[TokenRows, Counts]:
    columns = ("length", "prompt_length")
    lengths, prompts = (
        [row[name] for row in rows] if isinstance(rows, list) else list(rows[name][:]) for name in columns
    )
    kept, counts = fit(
        rows,
        lengths,
        prompts,
        max_length=options.max_length,
        truncation=options.truncation,
        context_lengths=None if options.context_column is None else context_lengths(rows),
    )
    if not kept:
        raise DataError(
            f"dataset: {options.dataset_args!r} ({split}) has {len(lengths)} rows, but none has a token to learn "
            f"within max_length {options.max_length}; raise it."
        )
    if split == TRAIN and options.context_column is not None:
        require_context(kept)
    return kept, counts
