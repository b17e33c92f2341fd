"""`memdlm generate --model MODEL "prompt"`: load, decode, print."""

from collections.abc import Sequence
from dataclasses import replace

from memdlm.cli.decoding import decoding_parser, parse
from memdlm.cli.output import note, say
from memdlm.randomness import derive
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import OwnWords, Tally, decode, load
from memdlm.workflows.sessions.reading import opened, readers_of, saved_memory


def main(argv: Sequence[str]) -> int:
    """Print one response per prompt; on standard error, print tokens, time and passes."""
    parser = decoding_parser("generate", "Decode a response to each prompt.")
    parser.add_argument("prompts", nargs="+", help="texts; with --chat each is one user message")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    options, config, memory, (given,) = parse(parser, argv)
    saved = saved_memory(options)
    decoder = load(options, memory, config, Display())
    OwnWords(decoder.tokenizer, note).check(given.prompts, "prompts")
    if not options.mem_enabled:
        decoder = replace(decoder, memory=None)
    prompts = [[{"role": "user", "content": text}] if given.chat else text for text in given.prompts]
    job = decoder.prepare(prompts, [derive("memdlm generate", options.seed, index) for index in range(len(prompts))])
    tally = Tally()
    with opened(readers_of(saved, decoder.model, decoder.tokenizer)):
        result = decode(job, tally, console=PlainConsole(stderr=True), trace=options.trace)
    for text in result.texts:
        say(text)
    note(tally.line())
    return 0
