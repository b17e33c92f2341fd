"""Answer questions from saved memories: one write, any number of questions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from torch import Tensor

from memdlm.data.documents import read_document
from memdlm.data.records import read_file
from memdlm.data.synthetic import exact_match
from memdlm.diffusion.likelihood import monte_carlo_rows
from memdlm.errors import ConfigError, DataError
from memdlm.inference import Decoder, GenerationConfig
from memdlm.inference.decoder import Job
from memdlm.inference.prompts import Prompt
from memdlm.memory import SavedMemory
from memdlm.memory.files.library import sources_of
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.networks.soundness import blaming
from memdlm.options import option
from memdlm.padding import right_padded
from memdlm.randomness import derive
from memdlm.templates import check_text
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import ModelOptions, OwnWords, Tally, decode, load_parts
from memdlm.workflows.sessions.documents import BETWEEN
from memdlm.workflows.sessions.reading import Reader, opened, readers_of, saved_memories

SAMPLES = 8
"""Noised copies of an answer from which its likelihood is estimated."""


@dataclass(frozen=True, kw_only=True)
class AskOptions(ModelOptions):
    """What is asked, and of which memories."""

    memory: tuple[str, ...] | None = option(
        None,
        "Folder of a memory that memdlm memorize wrote, or of several memories. Give the flag again for more. Of "
        "several, the one under which its own answer is likeliest per token answers.",
        repeated="append",
    )
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
        if isinstance(self.memory, (str, list)):
            object.__setattr__(self, "memory", (self.memory,) if isinstance(self.memory, str) else tuple(self.memory))
        super().__post_init__()
        if not self.memory:
            raise ConfigError("--memory is missing: name a folder that memdlm memorize wrote.")
        if self.file is not None and not self.keep_context:
            raise ConfigError("file has no effect without keep_context: the memory stands for the document.")
        if self.output is not None and self.questions is None:
            raise ConfigError("output has no effect without questions (a .jsonl file); answers are printed.")
        if self.overwrite and self.output is None:
            raise ConfigError("overwrite has no effect without output (a .jsonl file); answers are printed.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer, and where it comes from."""

    text: str
    memory: str
    """Path of the memory that answered."""
    nats: dict[str, float]
    """With several memories: by path, minus the log-likelihood of the memory's answer under it, per token."""


@final
@dataclass(slots=True)
class Asker:
    """A model with memories to read, and the cost of its answers so far."""

    readers: Sequence[Reader]
    decoders: Sequence[Decoder]
    """One per reader: what is shown in front of the questions, and so what is cached, differs."""
    contexts: Sequence[str | None]
    """Per reader, the text shown in front of every question; None for nothing."""
    words: OwnWords
    """Warns of unknown words in questions."""
    chat: bool = True
    seed: int = 0
    tally: Tally = field(default_factory=Tally)
    count: int = 0
    is_open: bool = False
    """Whether the only memory is open already, for all questions."""

    def answer(self, questions: Sequence[str], console: Console) -> list[Answer]:
        """Answer a batch of questions, each on its own, from the memory under which its answer is likeliest.

        Every memory answers. Of each answer, end token included, the Monte-Carlo bound of the likelihood is taken under
        the memory that gave it, with the same noise for all, and divided by the number of its tokens.
        """
        self.words.check(questions, "question" if len(questions) == 1 else f"{len(questions)} questions")
        found = [self._under(place, questions, console) for place in range(len(self.readers))]
        self.count += len(questions)
        answers = []
        for per_memory in zip(*found, strict=True):
            nats = {reader.path: nats for reader, (_, nats) in zip(self.readers, per_memory, strict=True)}
            best = min(range(len(per_memory)), key=lambda place: per_memory[place][1])
            text, path = per_memory[best][0], self.readers[best].path
            answers.append(Answer(text=text, memory=path, nats=nats if len(nats) > 1 else {}))
        return answers

    def _under(self, place: int, questions: Sequence[str], console: Console) -> list[tuple[str, float]]:
        """Return every answer under one memory, and its nats per token (0 if there is no other memory)."""
        decoder = self.decoders[place]
        numbers = range(self.count, self.count + len(questions))
        prompts = [self._prompt(question, self.contexts[place]) for question in questions]
        job = decoder.prepare(prompts, [derive("memdlm ask", self.seed, number) for number in numbers])
        with nullcontext() if self.is_open else self.readers[place].opened():
            result = decode(job, self.tally, console=console)
            texts = [text.strip() for text in result.texts]
            if len(self.readers) == 1:
                return [(text, 0.0) for text in texts]
            return list(zip(texts, self._nats(decoder, job, result.sequences, numbers), strict=True))

    def _nats(self, decoder: Decoder, job: Job, sequences: Sequence[Tensor], numbers: Sequence[int]) -> list[float]:
        """Return the nats per token of every answer, all of them from one pass of the network."""
        ids, lengths = right_padded(sequences, decoder.special.eos)
        device = next(decoder.model.parameters()).device
        is_text = torch.arange(ids.shape[1]) < lengths[:, None]
        spans = [
            (len(prompt), len(sequence) - len(prompt)) for prompt, sequence in zip(job.rows, sequences, strict=True)
        ]
        denoise = ModelDenoiser(
            decoder.model,
            attention_mask=None if bool(is_text.all()) else is_text.to(device),
            attention_pattern=decoder.pattern,
            right_shift_logits=decoder.options.right_shift_logits,
        )
        with blaming(decoder.model):
            found = monte_carlo_rows(
                denoise,
                ids.to(device),
                spans,
                mask_token_id=decoder.special.mask,
                num_samples=SAMPLES,
                generators=[derive("memdlm ask likelihood", self.seed, number) for number in numbers],
            )
        return [nats / length for nats, (_, length) in zip(found.tolist(), spans, strict=True)]

    def _prompt(self, question: str, context: str | None) -> Prompt:
        text = question if context is None else f"{context}{BETWEEN}{question}"
        if self.chat and self.decoders[0].tokenizer.chat_template is not None:
            return [{"role": "user", "content": text}]
        return text


@contextmanager
def asker(options: AskOptions, config: GenerationConfig, display: Display) -> Iterator[Asker]:
    """Load the model and check that it can read the memories; nothing is written.

    Raises MemoryFileError when a memory is damaged or was written for another model or tokenizer, DataError when
    a document is to be shown but is missing or was changed.
    """
    memories = saved_memories(options.memory or ())
    if options.file is not None and len(memories) > 1:
        raise ConfigError("file names one document, but there are several memories; leave it out.")
    contexts = [_context(options, saved) if options.keep_context else None for saved in memories.values()]
    model, tokenizer = load_parts(options, display)
    readers = readers_of(memories, model, tokenizer)
    decoder = Decoder(model, tokenizer, config)
    words = OwnWords(tokenizer, display.say)
    decoders = [decoder.caching(reader.memory) if options.keep_context else decoder for reader in readers]
    is_one = len(readers) == 1
    with opened(readers) if is_one else nullcontext():
        yield Asker(readers, decoders, contexts, words, options.chat, options.seed, is_open=is_one)


def _context(options: AskOptions, saved: SavedMemory) -> str:
    sources = sources_of(saved)
    if options.file is not None:
        if len(sources) > 1:
            raise ConfigError(f"file names one document, but the memory was written from {len(sources)}; leave it out.")
        return _shown(options.file, sources[0].get("source_sha256"))
    texts = []
    for source in sources:
        if "source" not in source:
            raise DataError(
                "keep_context: the memory does not say which document it was written from; name it with --file."
            )
        if not Path(source["source"]).is_file():
            raise DataError(
                f"keep_context: the document was at {source['source']!r} and is not there; name it with --file."
            )
        texts.append(_shown(source["source"], source.get("source_sha256")))
    return BETWEEN.join(texts)


def _shown(path: str, expected: str | None) -> str:
    document = read_document(path)
    if expected is not None and document.sha256 != expected:
        raise DataError(f"keep_context: {path!r} is not the document that was memorised; its checksum differs.")
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
    """Yield each row with its `response` and, if it has an `answer`, whether both have the same words.

    With several memories, the row also has the `memory` that answered, and the `nats` of each.
    """
    # One warning about all questions, not one per batch.
    asker.words.check([row["question"] for row in rows], f"{len(rows)} questions")
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for row, found in zip(part, asker.answer([row["question"] for row in part], console), strict=True):
            compared = {"correct": exact_match(row["answer"], found.text)} if "answer" in row else {}
            chosen = {"memory": found.memory, "nats": found.nats} if found.nats else {}
            yield {**row, "response": found.text, **compared, **chosen}
