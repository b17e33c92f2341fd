"""`memdlm chat --model MODEL`: load, then answer line by line."""

import sys
from collections.abc import Sequence

from rich.console import Console

from memdlm.cli.decoding import decoding_parser, parse
from memdlm.workflows.chat import COMMANDS, Chat, ChatOptions, typed
from memdlm.workflows.decoding import load


def main(argv: Sequence[str]) -> int:
    """Hold a conversation on standard input and output."""
    parser = decoding_parser("chat", f"Answer line by line. Commands: {', '.join(COMMANDS)}.", ChatOptions)
    options, config, memory, (chat_options,) = parse(parser, argv)
    setup = load(options, memory)
    console = Console()
    chat = Chat(
        setup=setup,
        config=config,
        options=chat_options,
        console=console,
        remembers=options.mem_enabled,
        seed=options.seed,
        trace=options.trace,
    )
    if console.is_terminal:
        console.print(f"{options.model}. Commands: {', '.join(COMMANDS)}", markup=False, highlight=False)
    chat.hold(typed("> " if sys.stdin.isatty() else ""))
    return 0
