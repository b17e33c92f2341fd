"""What a study compares: a plan (task, network, budget, measures), and arms that differ in their memory.

The question: can a model recall, from its memory alone, what attention cannot reach? In the default plan a sliding
window keeps the facts out of the questions' reach, so fast weights are the only channel between the two.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memdlm.data.synthetic import KeyValueRecall, Task
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig

OURS = "learned to be written"
MAIN = ("MDLM", "published", "first order", OURS)
"""The arms of the main comparison."""
UNWEIGHTED: dict[str, Any] = {"loss_weight_type": "uniform"}


@dataclass(frozen=True, kw_only=True)
class RecallPlan:
    """Task, network, budget and measures, the same for all arms."""

    task: Task = field(default_factory=lambda: KeyValueRecall(wording="symbols", num_keys=24, is_adjacent=True))
    train_length: int = 36
    """Words of context in training."""
    times: tuple[int, ...] = (1, 4, 16)
    """Context lengths of the evaluation, as multiples of the training length."""
    num_train: int = 3200
    num_eval: int = 64
    """Number of evaluated conversations per length."""
    few_from: int | None = None
    """From this multiple of the training length on, a quarter of the conversations is evaluated, for time's sake."""
    steps: int = 200
    schedule: tuple[tuple[float, int], ...] = ((0.9, 1), (0.1, 4))
    """Shares of the training and the length of their contexts, as a multiple of the training length. The last ones are
    longer: a few filler words that are written cost nothing in a short context. Several: rows are read in order."""
    batch_size: int = 32
    learning_rate: float = 5e-3
    rank: int = 16
    strides: int = 2
    """Strides of our memory; 2 suffice if a value is next to its key."""
    window: int | None = 4
    context: str = "kept"
    """`dropped`: the network sees only the questions, also in training; the context is written as a separate text."""
    network: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the network's configuration."""
    answer_words: int = 1
    tokenizer: Mapping[str, bool] = field(default_factory=dict)
    """Options of `build_word_tokenizer`."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the training arguments, such as `use_cpu` and `bf16`."""
    num_evals: int = 0
    """Number of loss evaluations during training."""
    inference: MemoryConfig | None = None
    """The memory that all arms are measured with; None: each with its own."""
    measures_bias: bool = False
    """Whether exposure bias is measured, too, on half of the conversations of the greatest length."""
    draws: Mapping[str, str] = field(
        default_factory=lambda: {name: f"recall {name}" for name in ("train", "validation", "held out")}
    )
    """Names from which conversations are drawn; other names give other conversations."""

    def __post_init__(self) -> None:
        if not all(share > 0 for share, _ in self.schedule) or not math.isclose(sum(s for s, _ in self.schedule), 1):
            raise ConfigError(f"schedule is {self.schedule}; its shares must be above 0 and sum to 1.")

    def stages(self) -> list[tuple[int, int]]:
        """Return the schedule as (steps, words of context)."""
        ends = [
            round(sum(share for share, _ in self.schedule[: number + 1]) * self.steps)
            for number in range(len(self.schedule))
        ]
        steps = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return [(count, times * self.train_length) for count, (_, times) in zip(steps, self.schedule, strict=True)]

    def conversations(self, times: int) -> int:
        """Return how many conversations of `times` the training length are evaluated."""
        is_few = self.few_from is not None and times >= self.few_from
        return max(1, self.num_eval // 4) if is_few else self.num_eval

    @property
    def lengths(self) -> list[int]:
        """Return the evaluated context lengths, in words."""
        return [self.train_length * times for times in self.times]

    @property
    def answer_steps(self) -> int:
        """Return the number of denoising steps for all answers of a conversation."""
        return self.task.num_questions * self.answer_words


def closed_book(**changes: Any) -> RecallPlan:
    """Return the plan with the context dropped after the write, and attention without limits: `memorize`, then `ask`.

    This is harder to learn than with a window: models spend longer in a phase in which they know the values that
    occurred, but not their keys. All masked tokens weigh the same in the loss, which ends this phase sooner than the
    bound's weight 1/t. The last steps have longer contexts than with a window: the memory is all that the model has, so
    a gate that is not quite shut costs more.
    """
    options: dict[str, Any] = {
        "context": "dropped",
        "window": None,
        "training": UNWEIGHTED,
        "steps": 400,
        "schedule": ((0.875, 1), (0.1, 4), (0.025, 16)),
    }
    steps = int(changes.get("steps", options["steps"]))
    return RecallPlan(**(options | {"num_train": 16 * steps} | changes))


def open_book(**changes: Any) -> RecallPlan:
    """Return the plan in which attention reaches everything and exposure bias is measured."""
    options: dict[str, Any] = {
        "task": KeyValueRecall(wording="symbols", num_keys=24),
        "train_length": 40,
        "times": (1, 2, 4),
        "num_train": 4000,
        "schedule": ((1.0, 1),),
        "steps": 600,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "window": None,
        "network": {"hidden_size": 64, "num_attention_heads": 4},
        "num_evals": 8,
        "inference": MemoryConfig.paper(),
        "measures_bias": True,
        "draws": {"train": "demo train", "validation": "demo validation", "held out": "demo test"},
    }
    options |= changes
    options["training"] = {
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": None,
        "warmup_steps": options["steps"] // 12,
        "logging_steps": max(1, options["steps"] // 30),
        "stratified_times": True,
        **options.get("training", {}),
    }
    return RecallPlan(**options)


def arms(plan: RecallPlan) -> dict[str, MemoryConfig | None]:
    """Return the arms of the main comparison and its ablations, with the memory that each is trained with."""
    shape: dict[str, Any] = {"inner_rank": plan.rank, "inner_alpha": 2.0 * plan.rank}
    source = "prompt" if plan.context == "kept" else "context"
    ours = MemoryConfig.recall(strides=plan.strides, write_source=source, **shape)
    nested: dict[str, Any] = {"masking_strategy": "pmc", "strides": 2, "num_inner_steps": 2}
    return {
        "MDLM": None,
        # Published batches are small; one memory for as many texts as here would hold next to nothing.
        "published": MemoryConfig.paper(per_sample=True, **shape),
        "first order": dataclasses.replace(ours, outer_gradient="first_order", write_gate="none"),
        OURS: ours,
        "lower blocks detached": dataclasses.replace(ours, outer_gradient="exact_top"),
        "no write gate": dataclasses.replace(ours, write_gate="none"),
        "fixed start": dataclasses.replace(ours, learn_start=False),
        "fixed rates": MemoryConfig.recall(strides=plan.strides, write_source=source, learn_lr=False, **shape),
        "one memory per batch": dataclasses.replace(ours, per_sample=False),
        "published masks": dataclasses.replace(ours, **nested),
        "response written": dataclasses.replace(ours, write_source="response"),
    }
