"""Describe a run without loading weights: its resolved options, sizes, estimated memory and step counts."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn
from transformers import PreTrainedModel

from memdlm.data.sources import load_conversations
from memdlm.data.specs import parse_specs
from memdlm.errors import CheckpointError, DataError, MemDLMError
from memdlm.memory.config import FastWeightsConfig
from memdlm.memory.sites import find_sites
from memdlm.models.blocks.chunked_loss import BYTES, MAX_SUMMED_LOGITS, at_once
from memdlm.models.blocks.experts import Experts
from memdlm.models.hub.loading import DTYPES, model_skeleton
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.models.lora.adapters import LoRAOptions, count_outer_lora
from memdlm.models.quantisation.four_bit import linears_of_blocks
from memdlm.training.arguments import TrainingArguments
from memdlm.workflows.display import Display
from memdlm.workflows.runs.datasets import TRAIN, load_data
from memdlm.workflows.runs.options import (
    DataOptions,
    ModelOptions,
    RunOptions,
    refuse_endless_blocks,
    refuse_idle,
    refuse_unread_context,
)

BYTES_4BIT = 0.5 + (1 + 4 / 256) / 64
"""Bytes per weight: 4 bits; one 8-bit scale per 64 weights; one float32 scale per 256 scales (nf4, double)."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All options of a run."""

    model: ModelOptions
    lora: LoRAOptions
    data: DataOptions
    run: RunOptions
    arguments: TrainingArguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Numbers of parameters."""

    total: int
    quantised: int
    """Number of parameters of the base model that are held in 4 bits."""
    trained: int
    fast: int
    """Number of parameters of one memory; 0 without memory."""


def resolved(plan: RunPlan, *, as_asked: bool = False) -> dict[str, Any]:
    """Return the run's options as a flat recipe: all of ours, and those of transformers that are not at their defaults.

    Options of an adapter that is not trained and of a memory that is off are left out. Transformers' options are what
    they became on this machine; `as_asked`: what they were given as, so that the recipe fits another machine too.
    """
    found: dict[str, Any] = {}
    for part in (plan.model, *((plan.lora,) if plan.model.lora else ()), plan.data, plan.run):
        found |= dataclasses.asdict(part)
    arguments = plan.arguments
    usual = {field.name: default_of(field) for field in dataclasses.fields(transformers.TrainingArguments)}
    # Those that memdlm declares anew have other defaults: leaving one out would mean another value.
    own = ({field.name for field in dataclasses.fields(TrainingArguments)} - set(usual)) | set(
        vars(TrainingArguments)["__annotations__"]
    )
    for field in dataclasses.fields(TrainingArguments):
        value = arguments.asked[field.name] if as_asked and field.init else getattr(arguments, field.name)
        if field.name in own:
            if not field.name.startswith("mem_") or arguments.mem_enabled or field.name == "mem_enabled":
                found[field.name] = value
        elif field.init and not _is_same(value, usual[field.name]) and field.name not in NOT_OPTIONS:
            found[field.name] = value
    found.pop("dry_run")
    return {name: _plain(value) for name, value in found.items()}


NOT_OPTIONS = {"accelerator_config", "deepspeed_plugin", "distributed_state", "local_rank", "debug", "do_eval"}
"""Fields that transformers fills in or converts itself."""


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """Return the default of a dataclass's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_same(value: Any, default: Any) -> bool:
    """Whether an option has its default; flags turn a "no" into False where an option takes both."""
    return bool(value == default or (value is False and default == "no"))


def _plain(value: Any) -> Any:
    """Return `value` in types that YAML can hold."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return getattr(value, "value", value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else str(value)


def sizes_of(plan: RunPlan, model: PreTrainedModel) -> Sizes:
    """Count parameters; `model` may be on the meta device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    quantised = _quantisable(model) if plan.model.load_in_4bit else 0
    trained = count_outer_lora(model, plan.lora) if plan.model.lora else 0 if plan.model.adapter else total
    config = plan.arguments.memory
    fast = 0 if config is None else _fast_parameters(model, config)
    return Sizes(total=total, quantised=quantised, trained=trained, fast=fast)


def _quantisable(model: nn.Module) -> int:
    linear = [model.get_submodule(f"{path}").get_parameter("weight") for path in linears_of_blocks(model)]
    experts = [weight for module in model.modules() if isinstance(module, Experts) for weight in module.parameters()]
    return sum(weight.numel() for weight in [*linear, *experts])


def _fast_parameters(model: nn.Module, config: FastWeightsConfig) -> int:
    return sum(map(config.adapter().size, find_sites(model, config.targets, config.inner_layer_fraction)))


def memory_estimate(plan: RunPlan, model: PreTrainedModel, sizes: Sizes) -> dict[str, float]:
    """Estimate bytes per device, by purpose; what FSDP or ZeRO would shard is not divided.

    The estimate of activations is rough. With gradient checkpointing: one saved input per block, and one block that
    is recomputed. Without: about 17 numbers per token, unit of width and block. Attention scores are not counted.
    """
    config, arguments = model.config, plan.arguments
    width = DTYPES.get(plan.model.dtype, config.dtype or torch.float32).itemsize
    adapted = plan.model.has_adapter
    trained_width = 4 if adapted else width
    tokens = arguments.per_device_train_batch_size * plan.data.max_length
    # Block diffusion sees the noised and the clean text in one pass.
    seen = tokens if arguments.block_size is None else 2 * tokens
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    compute = 2 if arguments.bf16 or arguments.fp16 else width
    per_block = 17 * hidden * seen * compute
    saved = layers * hidden * seen * compute + per_block if arguments.gradient_checkpointing else layers * per_block
    logits = min(tokens * vocabulary, at_once(MAX_SUMMED_LOGITS, arguments.device)) * BYTES
    copies = arguments.per_device_train_batch_size if arguments.memory and arguments.memory.per_sample else 1
    return {
        "weights": sizes.quantised * BYTES_4BIT + (sizes.total - sizes.quantised) * width,
        "adapter": sizes.trained * 4.0 if adapted else 0.0,
        "gradients": float(sizes.trained * trained_width),
        "optimizer": float(sizes.trained * 2 * trained_width),
        # The value, its gradient and the updated value, in float32.
        "fast weights": sizes.fast * copies * 4.0 * 3,
        "activations": float(saved),
        "logits": float(logits),
    }


def step_counts(arguments: TrainingArguments, rows: int) -> dict[str, int]:
    """Return rows, rows per optimizer step, steps per epoch, steps in total, and warm-up steps (part of the total)."""
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    batches = math.ceil(rows / (arguments.per_device_train_batch_size * arguments.world_size))
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    total = arguments.max_steps if arguments.max_steps > 0 else math.ceil(per_epoch * arguments.num_train_epochs)
    return {
        "rows": rows,
        "rows per step": per_step,
        "steps per epoch": per_epoch,
        "steps": total,
        "warm-up steps": arguments.get_warmup_steps(total),
    }


def describe_plan(plan: RunPlan, display: Display) -> str:
    """Return everything about a run as a recipe with comments; nothing is written and no weights are loaded.

    A model or dataset on the hub that cannot be reached is reported as unknown. Errors in local models, local datasets
    or options are raised.
    """
    refuse_idle(plan.model, plan.lora)
    refuse_unread_context(plan.data, plan.arguments.memory)
    refuse_endless_blocks(plan.data, plan.arguments.block_size)
    options = yaml.safe_dump(resolved(plan, as_asked=True), sort_keys=False, allow_unicode=True).rstrip()
    facts = _facts(plan, display)
    return "\n".join(["# configuration", options, "", *(f"# {line}".rstrip() for line in facts)])


def _facts(plan: RunPlan, display: Display) -> list[str]:
    try:
        model = model_skeleton(plan.model.path)
    except CheckpointError as error:
        if not _is_on_the_hub(plan.model.path):
            raise
        return [f"model: unknown here ({_one_line(error)})", *_about_steps_without_model(plan)]
    return [*_about_model(plan, model), *_about_steps(plan, display)]


def _about_model(plan: RunPlan, model: PreTrainedModel) -> list[str]:
    sizes = sizes_of(plan, model)
    estimate = memory_estimate(plan, model, sizes)
    trained = "those of the adapter" if plan.model.adapter else f"{sizes.trained:,}"
    return [
        f"model: {type(model).__name__}",
        f"parameters          {sizes.total:,}",
        f"trained             {trained}",
        f"fast weights        {sizes.fast:,}",
        "",
        "memory per device, estimated, in GiB",
        *(f"{name:<19} {value / GIB:.2f}" for name, value in estimate.items()),
        f"{'sum':<19} {sum(estimate.values()) / GIB:.2f}",
        "",
    ]


def _about_steps(plan: RunPlan, display: Display) -> list[str]:
    tokenizer = load_tokenizer(plan.model.path)
    try:
        data = load_data(plan.data, tokenizer, evaluates=plan.arguments.eval_strategy != "no", display=display)
        data.check(plan.arguments)
    except DataError as error:
        return _unknown_steps(plan, error)
    counts = [f"{split:<19} {found.words()}" for split, found in data.counts.items()]
    steps = step_counts(plan.arguments, len(data.train))
    return ["steps", *(f"{name:<19} {value:,}" for name, value in steps.items()), *counts]


def _about_steps_without_model(plan: RunPlan) -> list[str]:
    """Return the lines about conversations; how many of them fit is unknown without a tokenizer."""
    if plan.data.load_preprocessed_data:
        return ["steps: unknown here (without the tokenizer, preprocessed data cannot be checked)"]
    try:
        splits = load_conversations(plan.data.dataset_args, plan.data.columns)
    except DataError as error:
        return _unknown_steps(plan, error)
    steps = step_counts(plan.arguments, len(splits[TRAIN])) if TRAIN in splits else {}
    found = [f"{split:<19} {len(conversations):,} conversations" for split, conversations in splits.items()]
    counts = [f"{name:<19} {value:,}" for name, value in steps.items()]
    return ["steps, at most (without the tokenizer, it is unknown which conversations fit)", *counts, *found]


def _unknown_steps(plan: RunPlan, error: DataError) -> list[str]:
    """Return a line that data on the hub could not be counted; raises `error` if no dataset is on the hub."""
    parts = parse_specs(plan.data.dataset_args)
    if not any(_is_on_the_hub(str(part.path)) for part in parts):
        raise error
    steps = plan.arguments.max_steps
    return [f"steps: {steps if steps > 0 else 'unknown here'} ({_one_line(error)})"]


def _is_on_the_hub(name: str) -> bool:
    return not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _one_line(error: MemDLMError) -> str:
    return " ".join(str(error).split())
