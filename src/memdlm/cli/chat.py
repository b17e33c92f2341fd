"""`memdlm chat --model MODEL`: load, then answer line by line."""

import sys
from collections.abc import Sequence

from memdlm.cli.decoding import decoding_parser, parse
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.chat import COMMANDS, Chat, ChatOptions, typed
from memdlm.workflows.sessions.decoding import load
from memdlm.workflows.sessions.reading import readers_of, saved_memory


def main(argv: Sequence[str]) -> int:
    """Hold a conversation on standard input and output."""
    parser = decoding_parser(
        "chat", f"Hold a conversation, one line per message. Commands: {', '.join(COMMANDS)}.", ChatOptions
    )
    options, config, memory, (chat_options,) = parse(parser, argv)
    saved = saved_memory(options)
    decoder = load(options, memory, config, Display())
    console = PlainConsole()
    chat = Chat(
        decoder=decoder,
        options=chat_options,
        console=console,
        remembers=options.mem_enabled,
        seed=options.seed,
        trace=options.trace,
    )
    for reader in readers_of(saved, decoder.model, decoder.tokenizer):
        chat.read(reader)
    if console.is_terminal:
        console.print(f"{options.model}. Commands: {', '.join(COMMANDS)}")
    chat.hold(typed("> " if sys.stdin.isatty() else ""))
    return 0
