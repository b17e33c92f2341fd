"""Limits of transformers' own training arguments: it accepts any value, and then fails late or never ends."""

import typing
from typing import Any

import torch
import transformers
from transformers import get_scheduler

from memdlm.errors import ConfigError
from memdlm.options import check_value, members_of

SEEDS = 2**32 - 1
"""The largest seed that numpy takes."""
_BOUNDS: tuple[tuple[str, dict[str, float]], ...] = (
    ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps", {"minimum": 1}),
    ("eval_accumulation_steps torch_empty_cache_steps dataloader_prefetch_factor", {"minimum": 1}),
    ("ddp_timeout ddp_bucket_cap_mb save_total_limit", {"minimum": 1}),
    ("num_train_epochs adam_epsilon logging_steps save_steps eval_steps", {"above": 0}),
    ("learning_rate weight_decay warmup_steps eval_delay", {"minimum": 0}),
    ("max_grad_norm neftune_noise_alpha dataloader_num_workers", {"minimum": 0}),
    ("adam_beta1 adam_beta2", {"minimum": 0, "below": 1}),
    ("seed data_seed", {"minimum": 0, "maximum": SEEDS}),
    ("max_steps", {"minimum": -1}),
)
LIMITS = {name: bounds for names, bounds in _BOUNDS for name in names.split()}
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules that ignore `lr_scheduler_kwargs`."""


def check_numbers(arguments: Any) -> None:
    """Raise ConfigError for a number or switch that is of another type, not finite, or out of bounds."""
    hints = typing.get_type_hints(transformers.TrainingArguments)
    for name, hint in hints.items():
        if members_of(hint) <= {int, float, bool, type(None)}:
            check_value(name, getattr(arguments, name), hint, LIMITS.get(name, {}))
    if arguments.max_steps == 0:
        raise ConfigError("max_steps must be at least 1, or -1 for num_train_epochs epochs, got 0.")


def check_schedule(arguments: Any) -> None:
    """Raise ConfigError when the schedule cannot be made with `lr_scheduler_kwargs`."""
    name, more = (
        str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        arguments.lr_scheduler_kwargs,
    )
    if more and name in WITHOUT_OPTIONS:
        raise ConfigError(f"lr_scheduler_kwargs={more!r} has no effect with lr_scheduler_type={name!r}; leave it out.")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=arguments.learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, 0, 2, more)
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            optimizer.step()
            schedule.step()
    # A wrong value makes the schedule's arithmetic fail in any of these ways.
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        raise ConfigError(f"lr_scheduler_kwargs={more!r} do not fit lr_scheduler_type={name!r}: {error}.") from error
