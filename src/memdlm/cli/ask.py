"""`memdlm ask --model MODEL --memory doc.mem "question"`: ask memories, once, in a batch, or line by line."""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from memdlm.cli.decoding import decoding_defaults
from memdlm.cli.output import note, say
from memdlm.cli.parsing import DataclassParser
from memdlm.data.records import as_jsonl
from memdlm.errors import ConfigError
from memdlm.inference import PRESETS, GenerationConfig
from memdlm.outputs import output_file
from memdlm.terminal import json_text
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.ask import Answer, Asker, AskOptions, answered, asker, holds_answers, read_questions
from memdlm.workflows.sessions.chat import typed


def main(argv: Sequence[str]) -> int:
    """Print one answer per question; on standard error, print tokens, time and passes."""
    parser = ask_parser()
    options, config, given = parser.parse(decoding_defaults(argv), argv)
    config.refuse_idle(parser.given)
    if given.question and options.questions is not None:
        raise ConfigError("give questions on the command line or in a file (--questions), not both.")
    rows = None if options.questions is None else read_questions(options.questions)
    with ExitStack() as stack:
        write = None
        if options.output is not None:
            # The file is taken before the model is loaded, and held until the answers are written.
            write = stack.enter_context(
                output_file(options.output, holds_answers, "answers", overwrite=options.overwrite)
            )
        ready = stack.enter_context(asker(options, config, Display()))
        if rows is not None:
            _batch(ready, rows, options, write)
        else:
            for question in given.question or typed("> " if sys.stdin.isatty() else ""):
                if question.strip():
                    say(told(ready.answer([question.strip()], PlainConsole(stderr=True))[0]), flush=True)
        note(f"{ready.count} answers: {ready.tally.line()}")
    return 0


def ask_parser() -> DataclassParser:
    """Return the command's parser."""
    parser = DataclassParser(
        (AskOptions, GenerationConfig),
        prog="memdlm ask",
        description="Answer questions from one memory or several. If none is given, they are read from standard input "
        f"line by line. Presets: {', '.join(PRESETS)}.",
    )
    parser.add_argument("question", nargs="*", help="questions; each is answered on its own")
    return parser


def told(answer: Answer) -> str:
    """Return the answer and, if several memories were asked, the one that answered and how sure each was."""
    if not answer.nats:
        return answer.text
    others = ", ".join(f"{path} {nats:.2f}" for path, nats in answer.nats.items() if path != answer.memory)
    return f"{answer.text}\n  ({answer.memory}: {answer.nats[answer.memory]:.2f} nats per token; {others})"


def _batch(
    ready: Asker, rows: list[dict[str, object]], options: AskOptions, write: Callable[[bytes], None] | None
) -> None:
    found = []
    for row in answered(ready, rows, options.batch_size, PlainConsole(stderr=True)):
        found.append(row)
        if write is None:
            say(json_text(row), flush=True)
    if write is not None:
        write(as_jsonl(found))
    compared = [row["correct"] for row in found if "correct" in row]
    if compared:
        note(f"{sum(compared)} of {len(compared)} answers are exact")
