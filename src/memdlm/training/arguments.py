"""What a training run can be told: transformers' arguments, the diffusion options, and the memory's as mem_*."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers

from memdlm.diffusion.losses import NORMS, WEIGHTINGS
from memdlm.diffusion.schedules import SCHEDULES
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.options import as_flags, from_flags, option, validate


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The outer loss (spec of MDLM training as in the LLaDA recipes)."""

    time_epsilon: float = option(1e-3, "Times are drawn from [epsilon, 1).", above=0, maximum=0.999)
    schedule: str = option("linear", "Noise schedule.", choices=tuple(SCHEDULES))
    loss_weight_type: str = option("scheduler", "Weight of the loss at time t.", choices=tuple(WEIGHTINGS))
    loss_norm_type: str = option("token", "What the loss is divided by.", choices=NORMS)
    right_shift_logits: bool = option(
        False, "The network predicts position i at i - 1 (converted from autoregressive)."
    )
    stratified_times: bool = option(True, "Spread the times of an optimizer step evenly; each stays uniform.")

    def __post_init__(self) -> None:
        validate(self)


if TYPE_CHECKING:

    class _Flags(transformers.TrainingArguments):
        mem_enabled: bool
        time_epsilon: float
        schedule: str
        loss_weight_type: str
        loss_norm_type: str
        right_shift_logits: bool
        stratified_times: bool
else:
    _Flags = dataclasses.make_dataclass(
        "_Flags",
        [
            *as_flags(DiffusionConfig),
            (
                "mem_enabled",
                bool,
                dataclasses.field(default=False, metadata={"help": "Train with parametric memory."}),
            ),
            *as_flags(MemoryConfig, prefix="mem_"),
        ],
        bases=(transformers.TrainingArguments,),
    )


@dataclass
class TrainingArguments(_Flags):
    """`transformers.TrainingArguments` plus the options of `DiffusionConfig` and, prefixed `mem_`, of `MemoryConfig`.

    Defaults that differ from transformers' are the published recipe's. Raises ConfigError for an unknown value, and
    for a memory option while `mem_enabled` is off.
    """

    learning_rate: float = dataclasses.field(default=2e-5, metadata={"help": "Peak learning rate of the outer AdamW."})
    lr_scheduler_type: str = dataclasses.field(default="cosine", metadata={"help": "Learning-rate schedule."})
    remove_unused_columns: bool = dataclasses.field(
        default=False,
        metadata={"help": "Must stay off: the collator reads columns that the network does not."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns=True would drop labels; leave it False.")
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect on the masked loss; leave it 0."
            )
        self.diffusion = from_flags(DiffusionConfig, self)
        self.memory = self._memory()

    def _memory(self) -> MemoryConfig | None:
        if not self.mem_enabled:
            for field in dataclasses.fields(MemoryConfig):
                value: Any = getattr(self, f"mem_{field.name}")
                if value != field.default:
                    raise ConfigError(
                        f"mem_{field.name}={value!r} has no effect without memory; "
                        "add mem_enabled=True or leave it out."
                    )
            return None
        options = {field.name: getattr(self, f"mem_{field.name}") for field in dataclasses.fields(MemoryConfig)}
        # In training, as published: one memory per batch, the same on all ranks, and the outer loss's weight and norm.
        options["per_sample"] = bool(options["per_sample"])
        if options["sync_inner"] is None:
            options["sync_inner"] = not options["per_sample"] and options["outer_gradient"] == "first_order"
        options["loss_weight_type"] = options["loss_weight_type"] or self.loss_weight_type
        options["loss_norm_type"] = options["loss_norm_type"] or self.loss_norm_type
        return MemoryConfig(**options)
