"""The `memdlm` command: find the sub-command, run it, turn our errors into one line and exit status 2."""

import importlib
import logging
import sys
from collections.abc import Sequence

from memdlm import __version__
from memdlm.errors import MemDLMError, unknown

COMMANDS = {
    "demo": "the main job, offline: train, evaluate and compare small models, and write a report",
    "info": "describe a model and where its fast weights would sit, a memory, or a folder of memories",
    "preprocess": "tokenize a dataset once, for many training runs",
    "train": "train a model from a recipe file and/or flags",
    "generate": "decode a response to a prompt, with or without memory",
    "infill": "fill the mask tokens of a text",
    "chat": "hold a conversation in the terminal",
    "memorize": "write a document into a memory once, and keep it as a file",
    "ask": "answer questions from a memory, with the document shown as well or not",
    "eval": "evaluate a model with lm-evaluation-harness, with or without memory",
    "exposure-bias": "measure how much a model suffers from its own tokens, with and without memory",
    "merge": "fold an outer adapter into its base model",
    "report": "put training runs, evaluations and demos side by side on one page",
}
"""Sub-commands; each is a module of this package with `main(argv) -> int`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm ARGV...`; returns the exit status: 0, 2 for bad input, 1 for a fault, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"memdlm {__version__}")
        return 0
    # It warns on import about a kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    name = arguments[0]
    try:
        if name not in COMMANDS:
            raise MemDLMError(unknown("command", name, COMMANDS))
        return importlib.import_module(f"memdlm.cli.{name.replace('-', '_')}").main(arguments[1:])
    except MemDLMError as error:
        print(f"memdlm {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"memdlm {name}: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: memdlm COMMAND [options]",
            "",
            *lines,
            "",
            "memdlm COMMAND --help lists a command's options.",
        ]
    )
