"""A training run from files: load, encode, train, save."""

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import IntervalStrategy, PreTrainedModel

from memdlm.data.collate import Collator
from memdlm.errors import ConfigError
from memdlm.files import make_folder, writing
from memdlm.models.hub.devices import AUTO, job_line
from memdlm.models.hub.loading import attention_of, dtype_on, load_model, model_skeleton
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.models.lora.adapters import LoRAOptions, add_outer_lora
from memdlm.training.arguments import TrainingArguments
from memdlm.training.checkpoints import NEVER, prepare_output
from memdlm.training.output_dir import held
from memdlm.training.states import check_checkpoint, left_out
from memdlm.training.trainer import MemDLMTrainer
from memdlm.workflows.display import Display
from memdlm.workflows.runs.datasets import load_data
from memdlm.workflows.runs.options import (
    DataOptions,
    ModelOptions,
    RunOptions,
    refuse_endless_blocks,
    refuse_idle,
    refuse_unread_context,
)
from memdlm.workflows.runs.plan import RunPlan
from memdlm.workflows.runs.resuming import check_same_data, check_same_run
from memdlm.workflows.runs.run_file import write_run_file
from memdlm.workflows.training_table import training_table


def run_training(
    model_options: ModelOptions,
    data_options: DataOptions,
    arguments: TrainingArguments,
    lora_options: LoRAOptions | None = None,
    run_options: RunOptions | None = None,
    display: Display | None = None,
) -> Path:
    """Train, write the final weights and tokenizer into `arguments.output_dir`, and return that folder.

    Errors in the data or in the checkpoint to resume from are found before the first step. Raises DataError,
    ConfigError or CheckpointError.
    """
    lora = LoRAOptions() if lora_options is None else lora_options
    display = Display() if display is None else display
    run = RunOptions() if run_options is None else run_options
    refuse_idle(model_options, lora)
    refuse_unread_context(data_options, arguments.memory)
    refuse_endless_blocks(data_options, arguments.block_size)
    name_for_trackers(arguments)
    out = Path(arguments.output_dir)
    make_folder(out)
    with ExitStack() as stack:
        if arguments.process_index == 0:
            sources = [name for name in (model_options.path, model_options.adapter) if name is not None]
            goes_on = run.resume != NEVER or arguments.resume_from_checkpoint is not None
            stack.enter_context(held(out, sources, goes_on=goes_on))
        stack.enter_context(writing(out))
        return _run(model_options, data_options, arguments, lora, run, display)


def _run(
    model_options: ModelOptions,
    data_options: DataOptions,
    arguments: TrainingArguments,
    lora: LoRAOptions,
    run: RunOptions,
    display: Display,
) -> Path:
    out = Path(arguments.output_dir)
    checkpoint = start_of(run, arguments, out)
    plan = RunPlan(model=model_options, lora=lora, data=data_options, run=run, arguments=arguments)
    changed = [] if checkpoint is None else check_same_run(plan, checkpoint, display)
    weights = dtype_on(model_options.path, model_options.dtype, arguments.device)
    if arguments.process_index == 0:
        display.say(first_line(model_options, arguments, weights))
    tokenizer = load_tokenizer(model_options.path)
    data = load_data(data_options, tokenizer, evaluates=arguments.eval_strategy != "no", display=display)
    data.check(arguments)
    for split, counts in data.counts.items():
        display.say(f"{split}: {counts.words()}")
    if data.evaluation is None and arguments.eval_strategy != IntervalStrategy.NO:
        evaluate_nothing(arguments)
    if checkpoint is not None:
        changed += check_same_data(data.manifest, plan, checkpoint, display)
    trainer = MemDLMTrainer(
        make_model(model_options, lora, arguments.seed, weights, device_of(arguments)),
        arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=Collator(tokenizer.pad_token_id, data_options.supervise_padding, block_size=arguments.block_size),
        processing_class=tokenizer,
    )
    if run.overwrite_output_dir:
        clear_output(arguments, out)
    if arguments.should_save:
        write_run_file(plan, data, checkpoint, changed)
    if checkpoint is not None:
        display.say(f"resuming from {checkpoint}")
    without = left_out(run.resume_without, arguments)
    with training_table(trainer, display, has_memory=arguments.memory is not None):
        trainer.train(None if checkpoint is None else str(checkpoint), resume_without=without)
    trainer.save_final(out)
    # `memdlm report` reads the log in this state, also when no checkpoints were saved.
    trainer.save_state()
    return out


def evaluate_nothing(arguments: TrainingArguments) -> None:
    """Turn evaluation off; raises ConfigError if the run was to keep its best checkpoint, which needs evaluation."""
    if arguments.load_best_model_at_end:
        raise ConfigError(
            "load_best_model_at_end=True, but there is nothing to evaluate on: name eval_dataset_args, or set it to "
            "False."
        )
    arguments.eval_strategy = IntervalStrategy.NO
    arguments.eval_on_start = arguments.do_eval = False


def name_for_trackers(arguments: TrainingArguments) -> None:
    """Set the project and name of a run for trackers, unless they are set."""
    arguments.run_name = arguments.run_name or Path(arguments.output_dir).absolute().name
    if "wandb" in (arguments.report_to or ()):
        # transformers only reads wandb's project from the environment.
        os.environ.setdefault("WANDB_PROJECT", arguments.project)


def start_of(run: RunOptions, arguments: TrainingArguments, out: Path) -> Path | None:
    """Return the checkpoint to resume from; transformers' `resume_from_checkpoint` means `resume` with a path.

    Raises ConfigError when both are given and when `out` holds another run's checkpoints, CheckpointError for a
    checkpoint that a run cannot resume from.
    """
    given = arguments.resume_from_checkpoint
    if given is not None and run.resume != NEVER:
        raise ConfigError(f"resume={run.resume!r} and resume_from_checkpoint={given!r} are both given; give one.")
    if given is not None and run.overwrite_output_dir:
        raise ConfigError(f"resume_from_checkpoint={given!r} and overwrite_output_dir=True contradict each other.")
    resume = run.resume if given is None else str(given)
    without = left_out(run.resume_without, arguments)
    # Earlier checkpoints are only deleted after all checks, see `_run`.
    checkpoint = None if run.overwrite_output_dir else prepare_output(out, resume, overwrite=False, without=without)
    if checkpoint is not None:
        check_checkpoint(checkpoint, arguments, without)
    elif without:
        raise ConfigError(
            f"resume_without={run.resume_without!r} has no effect: there is no checkpoint to resume from."
        )
    return checkpoint


def clear_output(arguments: TrainingArguments, out: Path) -> None:
    """Delete the checkpoints of an earlier run. One process does it, and the others wait."""
    with arguments.main_process_first(desc="output_dir"):
        if arguments.process_index == 0:
            prepare_output(out, NEVER, overwrite=True)


def first_line(options: ModelOptions, arguments: TrainingArguments, weights: str | torch.dtype) -> str:
    """Return the first line of a run, before data and weights are read."""
    attention = options.attn_implementation or attention_of(model_skeleton(options.path))
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return job_line(arguments.device, weights, attention, is_quantised=options.load_in_4bit, autocast=autocast)


def device_of(arguments: TrainingArguments) -> torch.device | None:
    """Return the device to load the model on: this process's own; None (the CPU) if weights will be sharded."""
    launched = [os.environ.get(f"ACCELERATE_USE_{name}", "").lower() for name in ("FSDP", "DEEPSPEED")]
    is_sharded = bool(arguments.fsdp or arguments.deepspeed) or bool({"1", "true", "yes"} & set(launched))
    return None if is_sharded or arguments.device.type == "cpu" else arguments.device


def make_model(
    options: ModelOptions,
    lora: LoRAOptions,
    seed: int,
    weights: str | torch.dtype = AUTO,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load the model to train, with an adapter if one is trained; `weights` is the dtype of its weights.

    The model is loaded and quantised on `device`; None: the CPU.
    """
    model = load_model(
        options.path,
        dtype=weights,
        device=device,
        load_in_4bit=options.load_in_4bit,
        adapter=options.adapter,
        attn_implementation=options.attn_implementation,
    )
    if not options.lora:
        return model
    # An adapter may be loaded from any folder, so that a local base needs its absolute path.
    base = str(Path(options.path).absolute()) if Path(options.path).exists() else options.path
    return add_outer_lora(model, lora, seed=seed, base=base)
