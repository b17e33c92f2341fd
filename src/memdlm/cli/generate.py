"""`memdlm generate --model MODEL "prompt"`: load, decode, print."""

from collections.abc import Sequence

from memdlm.cli.decoding import decoding_parser, parse
from memdlm.cli.output import note, say
from memdlm.inference import response_job, responses
from memdlm.randomness import derive
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.decoding import Tally, decode, load
from memdlm.workflows.display import Display


def main(argv: Sequence[str]) -> int:
    """Print one response per prompt, and on standard error what it took."""
    parser = decoding_parser("generate", "Decode a response to each prompt.")
    parser.add_argument("prompts", nargs="+", help="texts; with --chat each is one user message")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    options, config, memory, (given,) = parse(parser, argv)
    setup = load(options, memory, config, Display())
    prompts = [[{"role": "user", "content": text}] if given.chat else text for text in given.prompts]
    job = response_job(
        setup.model,
        setup.tokenizer,
        prompts,
        config,
        memory=setup.memory if options.mem_enabled else None,
        generator=[derive("memdlm generate", options.seed, index) for index in range(len(prompts))],
    )
    result, seconds = decode(job, responses, setup.tokenizer, console=PlainConsole(stderr=True), trace=options.trace)
    for text in result.texts:
        say(text)
    tally = Tally()
    tally.add(result, seconds)
    note(tally.line())
    return 0
