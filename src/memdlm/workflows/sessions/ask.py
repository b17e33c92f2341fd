"""Answer questions from a saved memory: one write, any number of questions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from rich.console import Console

from memdlm.data.documents import read_document
from memdlm.data.records import read_file
from memdlm.data.synthetic import exact_match
from memdlm.errors import ConfigError, DataError
from memdlm.inference import Decoder, GenerationConfig
from memdlm.inference.prompts import Prompt
from memdlm.memory import ParametricMemory, SavedMemory, read_memory
from memdlm.options import option
from memdlm.randomness import derive
from memdlm.templates import check_text
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import ModelOptions, OwnWords, Tally, decode, load_parts


@dataclass(frozen=True, kw_only=True)
class AskOptions(ModelOptions):
    """What is asked, and of which memory."""

    memory: str | None = option(None, "Folder of a memory that memdlm memorize wrote.")
    questions: str | None = option(
        None, "A .jsonl file with a `question` per line and, optionally, the `answer` to compare with."
    )
    output: str | None = option(None, "Write the answers to this .jsonl file; unset: print them.")
    overwrite: bool = option(False, "Replace earlier answers in output.")
    keep_context: bool = option(False, "Also show the document, in front of every question.")
    file: str | None = option(None, "With keep_context: path of the document; unset: its path when it was memorised.")
    chat: bool = option(
        True, "Put questions through the chat template if the tokenizer has one; False: use them as they are."
    )
    batch_size: int = option(8, "Number of questions answered together.", minimum=1, maximum=2**16)
    seed: int = option(0, "Seed of samples.")
    preset: str | None = option(None, "Preset of options recommended for a model family; other flags override it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is None:
            raise ConfigError("--memory is missing: name a folder that memdlm memorize wrote.")
        if self.file is not None and not self.keep_context:
            raise ConfigError("file has no effect without keep_context: the memory stands for the document.")
        if self.output is not None and self.questions is None:
            raise ConfigError("output has no effect without questions (a .jsonl file); answers are printed.")
        if self.overwrite and self.output is None:
            raise ConfigError("overwrite has no effect without output (a .jsonl file); answers are printed.")


@final
@dataclass(slots=True)
class Asker:
    """A model with one memory open, and the cost of its answers so far."""

    decoder: Decoder
    words: OwnWords
    """Warns of unknown words in questions."""
    context: str | None = None
    """Text shown in front of every question; None for nothing."""
    chat: bool = True
    seed: int = 0
    tally: Tally = field(default_factory=Tally)
    count: int = 0

    def answer(self, questions: Sequence[str], console: Console) -> list[str]:
        """Answer a batch of questions, each on its own. The memory must be open."""
        self.words.check(questions, "question" if len(questions) == 1 else f"{len(questions)} questions")
        job = self.decoder.prepare(
            [self._prompt(question) for question in questions],
            [derive("memdlm ask", self.seed, self.count + index) for index in range(len(questions))],
        )
        result = decode(job, self.tally, console=console)
        self.count += len(questions)
        return [text.strip() for text in result.texts]

    def _prompt(self, question: str) -> Prompt:
        text = question if self.context is None else f"{self.context}\n\n{question}"
        if self.chat and self.decoder.tokenizer.chat_template is not None:
            return [{"role": "user", "content": text}]
        return text


@contextmanager
def asker(options: AskOptions, config: GenerationConfig, display: Display) -> Iterator[Asker]:
    """Load the model and open the memory for the length of the block; nothing is written.

    Raises MemoryFileError when the memory is damaged or was written for another model or tokenizer, DataError when
    the document is to be shown but is missing or was changed.
    """
    saved = read_memory(str(options.memory))
    context = _context(options, saved) if options.keep_context else None
    model, tokenizer = load_parts(options, display)
    memory = ParametricMemory(model, saved.reading_config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    decoder = Decoder(model, tokenizer, config)
    words = OwnWords(tokenizer, display.say)
    with memory.recall(saved):
        yield Asker(decoder if context is None else decoder.caching(memory), words, context, options.chat, options.seed)


def _context(options: AskOptions, saved: SavedMemory) -> str:
    source = options.file if options.file is not None else saved.provenance.get("source")
    if source is None:
        raise DataError(
            "keep_context: the memory does not say which document it was written from; name it with --file."
        )
    if options.file is None and not Path(source).is_file():
        raise DataError(f"keep_context: the document was at {source!r} and is not there; name it with --file.")
    document = read_document(source)
    expected = saved.provenance.get("source_sha256")
    if expected is not None and document.sha256 != expected:
        raise DataError(f"keep_context: {source!r} is not the document that was memorised; its checksum differs.")
    return document.text


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Read rows with a `question` and an optional `answer`, both text. Raises DataError, which names the row."""
    rows = read_file(Path(path))
    for index, row in enumerate(rows):
        wrong = not isinstance(row, Mapping) or not isinstance(row.get("question"), str) or not row["question"].strip()
        if wrong or not isinstance(row.get("answer", ""), str):
            raise DataError(
                f"questions: {path}, row {index} needs a 'question' that is text (so must be an 'answer', if any)."
            )
        check_text(row["question"], f"questions: {path}, row {index}: ")
    return [dict(row) for row in rows]


def holds_answers(path: Path) -> bool:
    """Whether a file is what `memdlm ask --output` writes: a `question` and a `response`, both text, in every row."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except ValueError:
        return False
    keys = ("question", "response")
    return bool(rows) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys) for row in rows
    )


def answered(
    asker: Asker, rows: Sequence[dict[str, Any]], batch_size: int, console: Console
) -> Iterator[dict[str, Any]]:
    """Yield each row with its `response` and, if it has an `answer`, whether both have the same words."""
    # One warning about all questions, not one per batch.
    asker.words.check([row["question"] for row in rows], f"{len(rows)} questions")
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for row, response in zip(part, asker.answer([row["question"] for row in part], console), strict=True):
            compared = {"correct": exact_match(row["answer"], response)} if "answer" in row else {}
            yield {**row, "response": response, **compared}
