"""Load a model and a memory from command-line options, and decode with live output."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import final

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from memdlm.data.vocabulary import unknown_words
from memdlm.diffusion.sampling import Step
from memdlm.errors import ConfigError
from memdlm.inference import Decoder, Generation, GenerationConfig, Job
from memdlm.inference.loading import ModelOptions, check_vocabulary, loaded
from memdlm.inference.prompts import visible
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models.hub.loading import line_of
from memdlm.options import option
from memdlm.outputs import is_page, output_file
from memdlm.report.trace import Trace
from memdlm.terminal import printable
from memdlm.workflows.display import Display

OPEN = "\u2591"
"""Character shown for a token that is still masked."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(ModelOptions):
    """Options that generate, infill and chat share."""

    mem_enabled: bool = option(False, "Write each prompt into memory before it is answered.")
    memory: str | None = option(None, "Folder of a memory that memdlm memorize wrote; it is read, and not changed.")
    seed: int = option(0, "Seed of memories and samples.")
    preset: str | None = option(None, "Preset of options recommended for a model family; other flags override it.")
    trace: str | None = option(None, "HTML file to write: a page that replays the denoising.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is not None and self.mem_enabled:
            raise ConfigError(
                f"memory={self.memory!r} and mem_enabled=True exclude each other: one memory is open at a time. Read a "
                "saved memory, or write each prompt into a new one."
            )


def load_parts(options: ModelOptions, display: Display) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load model and tokenizer, and print where the model runs."""
    model, tokenizer = loaded(options)
    display.say(line_of(model))
    return model, tokenizer


def load(options: DecodingOptions, memory: MemoryConfig | None, config: GenerationConfig, display: Display) -> Decoder:
    """Load a decoder with a memory, even if memory is off (it costs nothing until it is written).

    Raises ConfigError for tokens that are not in the vocabulary, before the weights are loaded.
    """
    check_vocabulary(options, config)
    model, tokenizer = load_parts(options, display)
    written = ParametricMemory(
        model,
        memory,
        mask_token_id=tokenizer.mask_token_id,
        right_shift_logits=config.right_shift_logits,
        tokenizer=tokenizer,
    )
    return Decoder(model, tokenizer, config, memory=written)


@final
@dataclass(slots=True)
class OwnWords:
    """Warns of words that the tokenizer does not have, once per word."""

    tokenizer: PreTrainedTokenizerBase
    say: Callable[[str], None]
    named: set[str] = field(default_factory=set)
    """Words that a warning was about."""

    def check(self, texts: Sequence[str], what: str) -> None:
        """Warn if the texts, called `what`, have many unknown words, and some that no warning was about."""
        found = unknown_words(self.tokenizer, texts)
        if found.are_many and not self.named.issuperset(found.words):
            self.say(found.line(what))
            self.named.update(found.words)


@dataclass(slots=True)
class Tally:
    """The cost of decoding, summed over answers."""

    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0

    def add(self, result: Generation, seconds: float) -> None:
        """Count one result."""
        self.tokens += result.num_tokens
        self.passes += result.num_forward_passes
        self.seconds += seconds

    def line(self) -> str:
        """Return the cost as one line."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {rate:.1f} tokens/s, {self.passes} forward passes"


def decode(job: Job, tally: Tally, *, console: Console, trace: str | None = None) -> Generation:
    """Run `job` and add its cost to `tally`; on a terminal, show the first row while it is decoded."""
    record = None if trace is None else Trace(job)
    start, ids = time.perf_counter(), job.canvas.ids
    with _shown(console) as show:
        for step in job.steps():
            ids = step.ids
            if record is not None:
                record.add(step)
            if show is not None:
                show(live_text(job, step))
    seconds = time.perf_counter() - start
    result = job.result(ids)
    tally.add(result, seconds)
    if record is not None and trace is not None:
        with page_at(trace) as write:
            write(record.page().encode())
    return result


def page_at(trace: str) -> AbstractContextManager[Callable[[bytes], None]]:
    """Hold the file of a trace for writing, see `output_file`; it replaces an earlier trace.

    Raises ConfigError when its folder does not exist.
    """
    if Path(trace).is_dir() or not Path(trace).parent.is_dir():
        raise ConfigError(
            f"trace: {trace!r} is no file in a folder that exists; create the folder, or name another file."
        )
    return output_file(trace, is_page, "page", option="trace")


def live_text(job: Job, step: Step) -> Text:
    """Return the first row's response so far, with blanks for masked tokens."""
    tokenizer = job.decoder.tokenizer
    first, last = int(job.canvas.prompt_lengths[0]), int(job.canvas.response_ends[0])
    row = visible(step.ids[0, first:last].cpu(), job.decoder.text_ends)
    text = str(tokenizer.decode(row.tolist(), skip_special_tokens=False))
    for token in tokenizer.all_special_tokens:
        text = text.replace(str(token), OPEN if token == tokenizer.mask_token else "")
    return Text(printable(text))


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Text], None] | None]:
    if not console.is_terminal:
        yield None
        return
    # Transient, because the caller prints the finished text, unwrapped.
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield partial(live.update, refresh=True)
