"""The `memdlm` command: find the sub-command and run it."""

import importlib
import sys
from collections.abc import Sequence

from memdlm.cli.border import guarded
from memdlm.cli.help_pages import ALL, page
from memdlm.cli.output import say
from memdlm.errors import ConfigError, unknown
from memdlm.version import __version__

COMMANDS = {
    "demo": "train small models with and without memory, compare them and write a report, offline",
    "info": "describe a model and where its fast weights would sit; or a memory; or a folder of memories",
    "preprocess": "tokenize a dataset once, for many training runs",
    "recipes": "list the recipes that train takes by name, or print one",
    "train": "train a model from recipe files, flags, or both",
    "generate": "decode a response to a prompt, with or without memory",
    "infill": "fill the mask tokens of a text",
    "chat": "hold a conversation in the terminal",
    "memorize": "write a document into a memory once, and keep it as a file",
    "ask": "answer questions from memories, with or without the documents",
    "serve": "answer requests over HTTP, from a model and its memories, as OpenAI's API does",
    "memory": "list, show, rename, combine, compress, export and delete saved memories",
    "eval": "evaluate a model with lm-evaluation-harness, with or without memory",
    "exposure-bias": "measure how much a model suffers from decoding from its own tokens, with and without memory",
    "merge": "fold an outer adapter into its base model",
    "convert": "make a masked diffusion model of a decoder (Qwen2, Qwen3, Llama), a masked model or an encoder",
    "report": "put training runs, evaluations and demos side by side on one page",
    "completion": "print a script that completes commands and options in a shell",
}
"""Sub-commands; each is a module of this package with `main(argv) -> int`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `memdlm ARGV...`; returns the exit status.

    0: done. 1: the machine or the run is at fault. 2: the input is at fault. 130: Ctrl-C. 141: nobody reads the output.
    `--debug`, or MEMDLM_DEBUG=1, shows the traceback of an error.
    """
    return guarded("memdlm", list(sys.argv[1:] if argv is None else argv), _run)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:
        # memdlm help train
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", ALL, "help"):
        say(usage())
        return 0
    if arguments[0] == "--version":
        say(f"memdlm {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise ConfigError(unknown("command", name, COMMANDS))
    asked = arguments[1:] in (["-h"], ["--help"], [ALL])
    shown = page(name, everything=arguments[1:] == [ALL]) if asked else None
    if shown is not None:
        say(shown.removesuffix("\n"))
        # argparse also exits after it has shown a help page.
        sys.exit(0)
    status: int = importlib.import_module(f"memdlm.cli.{name.replace('-', '_')}").main(arguments[1:])
    return status


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
            "memdlm help COMMAND shows a command's first options; memdlm COMMAND --help-all shows all of them.",
        ]
    )
