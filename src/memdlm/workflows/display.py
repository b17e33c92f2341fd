"""What the user sees while a job runs: bars with the time left, or plain lines if there is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memdlm.terminal import printable
from memdlm.workflows.console import PlainConsole

Advance = Callable[[int], None]
"""Called with the amount of a task that is done so far."""


class Display:
    """Bars and messages of one job, on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = PlainConsole(stderr=True) if console is None else console
        self.seconds: dict[str, float] = {}
        """Wall-clock seconds per phase, summed."""

    @staticmethod
    def silent() -> "Display":
        """Return a display that shows nothing, for the processes of a launch beside the first."""
        return Display(PlainConsole(stderr=True, quiet=True))

    def say(self, text: str) -> None:
        """Print one message."""
        # No wrapping: rich would also break lines in a log file, at the width it assumes for a terminal.
        self.console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def bar(self, phase: str, description: str, total: int) -> Iterator[Advance]:
        """Show a bar for the length of the block; its time counts towards `phase`.

        Where there is no terminal, there is no bar, only the line at its end.
        """
        columns = (
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        start = time.perf_counter()
        try:
            with Progress(
                *columns, console=self.console, transient=True, disable=not self.console.is_terminal
            ) as progress:
                task = progress.add_task(printable(description), total=total)
                yield lambda done: progress.update(task, completed=done)
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        self.say(f"{description:<34} {spent:6.1f} s")


class StepBar(TrainerCallback):
    """Moves a bar with the optimizer steps of a Trainer."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the step that ended."""
        self.advance(state.global_step)


def show_steps(trainer: Trainer, advance: Advance) -> None:
    """Let `trainer` move a bar instead of printing its logs."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepBar(advance))
