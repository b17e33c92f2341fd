"""The options of a training run: transformers' arguments, the diffusion options, and the memory's as mem_*."""

import dataclasses
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers

from memdlm.diffusion.losses import NORMS, WEIGHTINGS, Planner
from memdlm.diffusion.schedules import SCHEDULES
from memdlm.diffusion.soft_masking import SoftMask, SoftMaskOptions
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.flags import DEFAULTS, PREFIX, memory_from_flags, unusual
from memdlm.models.hub.devices import AUTO, trains_on_the_cpu
from memdlm.options import as_flags, from_flags, option, own_options_first, validate
from memdlm.training.limits import check_numbers, check_schedule
from memdlm.training.noise import ATTEMPTS, NoiseShape

BLOCK_TIMES = ("block", "row")
"""What has a diffusion time of its own in block diffusion."""


@own_options_first
@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(SoftMaskOptions):
    """The options of the outer loss (MDLM training as in the LLaDA recipes)."""

    time_epsilon: float = option(1e-3, "Diffusion times are drawn from [time_epsilon, 1).", above=0, maximum=0.999)
    schedule: str = option("linear", "Noise schedule.", choices=tuple(SCHEDULES))
    loss_weight_type: str = option("scheduler", "Weight of the loss at time t.", choices=tuple(WEIGHTINGS))
    loss_norm_type: str = option("token", "What the loss is divided by.", choices=NORMS)
    right_shift_logits: bool | None = option(
        None,
        "The network's output at position i - 1 predicts position i (models converted from autoregressive ones); "
        "unset: as the family was trained.",
    )
    stratified_times: bool = option(
        False,
        "Spread the diffusion times of an optimizer step evenly over its rows on all ranks; each time stays uniform.",
    )
    redraw_empty: bool = option(
        False, "Draw a row's noise again, up to 10 times, until it masks a token (SDAR); evaluation does not."
    )
    block_size: int | None = option(
        None,
        "Block diffusion (BD3-LM): predict each block of this many tokens behind the clean text before it, as "
        "block-causal families decode; unset: the whole row at once under full attention.",
        minimum=1,
        maximum=2**24,
    )
    block_times: str = option(
        "block",
        "Diffusion times in block diffusion. block: one for each block (the BD3-LM paper); row: one for all blocks of "
        "a row (dLLM, SDAR).",
        choices=BLOCK_TIMES,
    )
    planner_weight: float = option(
        0.0,
        "PAPL: extra weight of the loss on tokens that decoding would commit next; 0: the plain loss.",
        minimum=0,
        maximum=1e6,
    )
    planner_temperature: float = option(
        1.0, "PAPL: the lower, the more the extra weight goes to the surest masked tokens.", minimum=1e-4, maximum=1e4
    )

    soft_mask_prob: float = option(
        0.0,
        "Soft-masking: share of rows that see the predictions of a first pass in place of [MASK]; 0: off.",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.soft_mask_prob == 0 and self.soft_masking(0) != SoftMaskOptions().soft_masking(0):
            raise ConfigError(
                "soft_mask_top_k, soft_mask_scale, soft_mask_steepness and soft_mask_centre have no effect without "
                "soft_mask_prob; set soft_mask_prob above 0, or leave them out."
            )
        if self.planner_weight == 0 and self.planner_temperature != 1.0:
            raise ConfigError(
                f"planner_temperature={self.planner_temperature} has no effect without planner_weight; "
                "set planner_weight above 0, or leave it out."
            )
        if self.redraw_empty and self.stratified_times:
            raise ConfigError(
                "redraw_empty=True and stratified_times=True: times that are drawn again are no longer spread evenly. "
                "Use one of them."
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        if self.block_size is None:
            if self.block_times != BLOCK_TIMES[0]:
                raise ConfigError(
                    f"block_times={self.block_times!r} has no effect without block_size; set it, or leave block_times "
                    "out."
                )
            return
        for name in ("planner_weight", "soft_mask_prob"):
            if getattr(self, name) > 0:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not defined for block diffusion (block_size={self.block_size}); "
                    "leave one of them out."
                )

    @property
    def noise_shape(self) -> NoiseShape:
        """What is drawn for a row in training."""
        block = self.block_size if self.block_times == "block" else None
        return NoiseShape(block=block, attempts=ATTEMPTS if self.redraw_empty else 1)

    def planner(self) -> Planner | None:
        """Build the planner's part of the loss; None for the plain loss."""
        return Planner(self.planner_weight, self.planner_temperature) if self.planner_weight > 0 else None

    def soft(self, mask_token_id: int) -> SoftMask | None:
        """Build soft-masking, which feeds predictions back; None when it is off."""
        return self.soft_masking(mask_token_id) if self.soft_mask_prob > 0 else None


if TYPE_CHECKING:

    class _Flags(transformers.TrainingArguments):
        def __getattr__(self, name: str) -> Any:
            """Return the value of one of our options."""

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
            *as_flags(MemoryConfig, PREFIX),
        ],
        bases=(transformers.TrainingArguments,),
    )


TRACKERS = ("tensorboard", "wandb", "trackio")
"""Where metrics can be logged: names of packages, and of the extras that install them."""


def _refuse_missing(trackers: Collection[str]) -> None:
    for name in TRACKERS:
        if name in trackers and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to={name!r}, but {name} is not installed. Install it with: pip install 'memdlm[{name}]', or "
                "choose another of tensorboard, wandb, trackio and none."
            )


def _take_deprecated_names(arguments: Any) -> None:
    """Give `gradient_checkpointing` its new name where transformers has one, which would warn about the old name.

    Recipes keep the old name: it works with every version that memdlm takes, and the new one does not.
    """
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if getattr(arguments, new, False) is None:
            setattr(arguments, new, getattr(arguments, old))


@dataclass
class TrainingArguments(_Flags):
    """`transformers.TrainingArguments` plus the options of `DiffusionConfig` and, prefixed `mem_`, of `MemoryConfig`.

    Defaults that differ from transformers' are the published recipe's. Raises ConfigError for an unknown value, and
    for a memory option while `mem_enabled` is off.
    """

    learning_rate: float = dataclasses.field(default=2e-5, metadata={"help": "Peak learning rate of the outer AdamW."})
    lr_scheduler_type: str = dataclasses.field(default="cosine", metadata={"help": "Learning-rate schedule."})
    report_to: None | str | list[str] = dataclasses.field(  # noqa: RUF036 - HfArgumentParser reads this order only
        default=AUTO,
        metadata={
            "help": "Where metrics are logged: tensorboard, wandb, trackio or none; auto: tensorboard if it is "
            "installed."
        },
    )
    project: str = dataclasses.field(
        default="memdlm",
        metadata={"help": "Project name of the run in wandb (unless WANDB_PROJECT is set) and trackio."},
    )
    run_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Name of the run in the trackers; unset: the last part of output_dir."}
    )
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False,
        metadata={"help": "Must stay off: a loss that is not finite stops the run."},
    )
    remove_unused_columns: bool = dataclasses.field(
        default=False,
        metadata={"help": "Must stay off: the collator needs columns that the network does not read."},
    )

    def __post_init__(self) -> None:
        # transformers replaces values by what they mean on this machine; a recipe for another one needs those given.
        self.asked = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        """By option, the value before transformers and this machine had a say."""
        _take_deprecated_names(self)
        # Without this, transformers refuses bf16 where the CPU is the only device.
        if trains_on_the_cpu():
            self.use_cpu = True
        check_numbers(self)
        if self.report_to in (AUTO, [AUTO]):
            self.report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        try:
            super().__post_init__()
        except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
            raise ConfigError(f"training arguments: {error}") from error
        check_schedule(self)
        _refuse_missing(self.report_to or ())
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns=True would drop labels; leave it False.")
        if self.logging_nan_inf_filter:
            raise ConfigError("logging_nan_inf_filter=True would log a loss that is not finite as 0; leave it False.")
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no effect on the masked loss; leave it 0."
            )
        self.diffusion = from_flags(DiffusionConfig, self)
        self.memory = self._memory()
        if self.memory is not None and self.soft_mask_prob > 0:
            raise ConfigError(
                f"soft_mask_prob={self.soft_mask_prob} and mem_enabled=True: soft-masking is a baseline without "
                "memory; what a write would see in place of [MASK] is not defined. Use one of them."
            )
        if self.memory is not None and self.memory.batch_mix is not None and self.block_size is not None:
            raise ConfigError(
                f"mem_batch_mix={self.memory.batch_mix!r} and block_size={self.block_size}: a reach of attention is "
                "not combined with block diffusion. Leave one of them out."
            )

        shares = None if self.memory is None else self.memory.batch_shares
        if shares is not None and shares.other and self.per_device_train_batch_size == 1:
            raise ConfigError(
                f"mem_batch_mix={self.mem_batch_mix!r} and per_device_train_batch_size=1: no other row's memory is "
                "there to be read. Use batches of two rows or more, or leave the fourth share out."
            )

    def _memory(self) -> MemoryConfig | None:
        flags: dict[str, Any] = {name: getattr(self, name) for name in DEFAULTS}
        said = unusual(flags)
        # In training, as published: one memory per batch, the same on all ranks, and the outer loss's weight and norm.
        flags["mem_per_sample"] = bool(self.mem_per_sample)
        if self.mem_sync_inner is None:
            flags["mem_sync_inner"] = not self.mem_per_sample and self.mem_outer_gradient == "first_order"
        flags["mem_loss_weight_type"] = self.mem_loss_weight_type or self.loss_weight_type
        flags["mem_loss_norm_type"] = self.mem_loss_norm_type or self.loss_norm_type
        return memory_from_flags(flags, said, is_on=self.mem_enabled, trains=True)
