"""What a training run shows: a bar, and a table with a row of named figures per log."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from memdlm.workflows.display import Advance, Display

COLUMNS = {
    "loss": ("loss", ".4g"),
    "nll": ("nll", ".4g"),
    "ppl": ("ppl", ".4g"),
    "nll_memory": ("nll_memory", ".4g"),
    "learning_rate": ("lr", ".2e"),
    "grad_norm": ("grad_norm", ".3g"),
    "tokens_per_second": ("tokens/s", ".3g"),
}
"""By the name of a logged figure: the heading of its column, and how it is written. A terminal that is too narrow does
not get the last ones."""
ONLY_MEMORY = "nll_memory"
_LEFT_OUT = re.compile(r"inner_.*|fast_norm|(nll|nll_memory)_t[\d.]+|runtime|.*_per_second|epoch|mfu|total_flos")
"""Logged figures that are left to the trackers: too many for a row."""
_HEAD = f"{'':5}  {'step':>6}  {'epoch':>6}"


class TrainingTable(TrainerCallback):
    """Prints a row per log of a Trainer, and moves a bar with its steps."""

    def __init__(self, display: Display, *, has_memory: bool, has_bar: bool) -> None:
        self._display, self._has_bar = display, has_bar
        self._columns = {name: told for name, told in COLUMNS.items() if has_memory or name != ONLY_MEMORY}
        while display.console.is_terminal and self._columns and self._breadth() > display.console.width:
            self._columns.popitem()
        self._advance: Advance | None = None
        self._stack = ExitStack()
        self._has_head = False

    def _breadth(self) -> int:
        return len(_HEAD) + sum(2 + _width(heading) for heading, _ in self._columns.values())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero and self._has_bar:
            self._advance = self._stack.enter_context(self._display.bar("training", "training", state.max_steps))
            self._advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._advance is not None:
            self._advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a row."""
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            self._display.say(
                f"{state.global_step} steps in {float(logs['train_runtime']):.1f} s, mean loss "
                f"{float(logs['train_loss']):.4g}; all figures are in {args.output_dir}/trainer_state.json"
            )
            return
        if not self._has_head:
            self._has_head = True
            headings = [f"{heading:>{_width(heading)}}" for heading, _ in self._columns.values()]
            self._display.say("  ".join([_HEAD, *headings]))
        self._display.say(self._row(logs, state))

    def _row(self, logs: Mapping[str, Any], state: TrainerState) -> str:
        is_evaluation = any(name.startswith("eval_") for name in logs)
        figures = {name.removeprefix("eval_"): float(value) for name, value in logs.items()}
        cells = [
            format(figures[name], f">{_width(heading)}{form}") if name in figures else " " * _width(heading)
            for name, (heading, form) in self._columns.items()
        ]
        others = [
            f"{name} {value:.4g}"
            for name, value in figures.items()
            if name not in COLUMNS and not _LEFT_OUT.fullmatch(name)
        ]
        kind = "eval" if is_evaluation else "train"
        start = f"{kind:5}  {state.global_step:>6}  {state.epoch or 0:>6.2f}"
        return "  ".join([start, *cells, *others]).rstrip()

    def close(self) -> None:
        """End the bar, also after an exception."""
        self._stack.close()


@contextmanager
def training_table(trainer: Trainer, display: Display, *, has_memory: bool) -> Iterator[None]:
    """Let `trainer` print a table for the length of the block, in place of its dictionaries and its own bar."""
    table = TrainingTable(display, has_memory=has_memory, has_bar=not trainer.args.disable_tqdm)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(table)
    try:
        yield
    finally:
        table.close()


def _width(heading: str) -> int:
    return max(len(heading), 8)
