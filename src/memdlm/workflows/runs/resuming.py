"""Resume a run: it must be the run that was interrupted, or declare that it changes options or data."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from memdlm.data.manifest import SUMS
from memdlm.errors import CheckpointError, ConfigError
from memdlm.training.output_dir import RUN_FILE
from memdlm.workflows.display import Display
from memdlm.workflows.runs.plan import RunPlan, default_of, resolved

WORLD = "world_size"

_PREFIXES = ("logging_", "log_", "save_", "eval_", "hub_", "trackio_", "dataloader_")
_KEPT = {"eval_dataset_args", "dataloader_drop_last"}
"""Options with these prefixes that still affect the training or the choice of the best checkpoint."""
FREE = frozenset(
    [
        *("output_dir", "resume", "overwrite_output_dir", "resume_from_checkpoint", "resume_changed"),
        "resume_without",
        *("num_proc", "preprocessed_dir", "ddp_timeout", "use_cpu", "skip_memory_metrics", "torch_empty_cache_steps"),
        *("disable_tqdm", "report_to", "run_name", "project", "push_to_hub", "do_train", "do_predict"),
        *("per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics", "bf16_full_eval"),
        *("fp16_full_eval", "include_num_input_tokens_seen", "include_for_metrics"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "mem_inner_gradient_checkpointing"),
    ]
)
"""Options that may change: what is logged, saved and evaluated, where, and how device memory is saved."""
CUT = ("per_device_train_batch_size", "gradient_accumulation_steps", WORLD)
"""How an optimizer step is split into batches and ranks."""
ONCE = {"right_shift_logits": False, "mem_attention": "full"}
"""Former defaults of options that now follow the family if unset; the families of then are the same."""
_LENGTH = ("max_steps", "num_train_epochs")


def earlier_run(checkpoint: Path) -> dict[str, Any] | None:
    """Return the run file of the run that wrote `checkpoint`; None if there is none (checkpoints of other programs).

    Raises CheckpointError for a damaged run file.
    """
    path = checkpoint.absolute().parent / RUN_FILE
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        options = {**found["options"], WORLD: found[WORLD]}
        if not all(isinstance(options[name], int) for name in CUT if name in options):
            raise ValueError(f"{', '.join(CUT)} must be whole numbers")
        if not isinstance(found["data"]["manifest"], dict):
            raise ValueError("there is no manifest of its data")
        return {**found, "options": options}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"resume: {path} cannot be read ({error!r}), so it is unknown which run wrote "
            f"{checkpoint.name}. Name the checkpoint as the model to start anew from its weights."
        ) from error


def check_same_run(plan: RunPlan, checkpoint: Path, display: Display) -> list[str]:
    """Compare the options of a resumed run with those of the run that wrote `checkpoint`; return the differences.

    What is logged, saved or evaluated may differ, and so may the split of a step if that changes nothing (see
    `is_same_step`). Raises ConfigError for any other difference, unless `resume_changed` is on: then it is printed.
    """
    earlier = earlier_run(checkpoint)
    if earlier is None:
        display.say(f"resume: there is no {RUN_FILE} beside {checkpoint}, so its options cannot be compared with these")
        return []
    now = {**resolved(plan), WORLD: plan.arguments.world_size}
    return _judge(differences(earlier["options"], now), plan, checkpoint, display)


def check_same_data(manifest: Mapping[str, Any], plan: RunPlan, checkpoint: Path, display: Display) -> list[str]:
    """Compare the data of a resumed run with those of the run that wrote `checkpoint`, as `check_same_run` does."""
    earlier = earlier_run(checkpoint)
    if earlier is None or _content(earlier["data"]["manifest"]) == _content(manifest):
        return []
    options = (("dataset_args", plan.data.dataset_args), ("eval_dataset_args", plan.data.eval_dataset_args))
    names = " and ".join(f"{name} {value!r}" for name, value in options if value is not None)
    return _judge(
        [f"{names}: the data, or the tokenizer they are encoded with, have changed"], plan, checkpoint, display
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one text per option that changes the run: its name, earlier value and present value."""
    usual = {field.name: default_of(field) for field in dataclasses.fields(transformers.TrainingArguments)}
    old, new = ({**usual, **options} for options in (old, new))
    for name, value in ONCE.items():
        if old.get(name) == value and new.get(name, value) is None:
            old[name] = None
    # Options of only one run belong to an adapter or memory that the other lacks; the switch for it differs, too.
    changed = {name for name in set(old) & set(new) if old[name] != new[name] and not _is_free(name)}
    if is_same_step(old, new):
        changed -= set(CUT)
    if old["lr_scheduler_type"] == new["lr_scheduler_type"] == "constant":
        changed -= set(_LENGTH)
    return [f"{name} was {old[name]!r}, now {new[name]!r}" for name in sorted(changed)]


def is_same_step(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two splits of an optimizer step give the same weights, up to rounding.

    They do if the number of rows is the same and there is no dropout, and no memory that rows of a batch share. With
    dropout or a shared memory, the batches must be the same, too.
    """
    (rows, pieces, ranks), (new_rows, new_pieces, new_ranks) = ([each[name] for name in CUT] for each in (old, new))
    if rows * pieces * ranks != new_rows * new_pieces * new_ranks:
        return False
    if any(options.get(name) for options in (old, new) for name in ("lora_dropout", "mem_inner_dropout")):
        return (rows, pieces, ranks) == (new_rows, new_pieces, new_ranks)
    if not new.get("mem_enabled") or new.get("mem_per_sample"):
        return True
    is_joint = new.get("mem_sync_inner")
    is_joint = new.get("mem_outer_gradient") == "first_order" if is_joint is None else is_joint
    return rows * ranks == new_rows * new_ranks if is_joint else rows == new_rows


def _is_free(name: str) -> bool:
    return name in FREE or (name.startswith(_PREFIXES) and name not in _KEPT)


def _judge(changed: list[str], plan: RunPlan, checkpoint: Path, display: Display) -> list[str]:
    if changed and not plan.run.resume_changed:
        raise ConfigError(
            f"resume: {checkpoint} was written by a run with other options or data: {'; '.join(changed)}. Give "
            "the earlier values to continue that run, name the checkpoint as the model to start a new run from its "
            "weights, or add --resume_changed True to resume with the changes."
        )
    for each in changed:
        display.say(f"resume: {each}")
    return changed


_PLACE = ("path", "memdlm", "format", SUMS)


def _content(manifest: Any) -> Any:
    """Return what a manifest says about the data, without their place and the version that wrote it."""
    if isinstance(manifest, list):
        return [_content(each) for each in manifest]
    if not isinstance(manifest, Mapping):
        return manifest
    found = {name: _content(value) for name, value in manifest.items() if name not in _PLACE}
    # Manifests of preprocessed folders are listed by folder.
    folders = [name for name, value in found.items() if isinstance(value, Mapping) and "sources" in value]
    if not folders:
        return found
    others = {name: value for name, value in found.items() if name not in folders}
    return {**others, "folders": [found[name] for name in folders]}
