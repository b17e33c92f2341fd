"""`memdlm infill --model MODEL "text with <|mask|> tokens"`: load, fill, print."""

from collections.abc import Sequence
from dataclasses import replace

from memdlm.cli.decoding import decoding_parser, parse
from memdlm.cli.output import note, say
from memdlm.errors import ConfigError
from memdlm.models import Full
from memdlm.randomness import derive
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import OwnWords, Tally, decode, load
from memdlm.workflows.sessions.reading import opened, readers_of, saved_memory

NOT_READ = ("max_new_tokens", "max_length", "eos_early_stop")
"""Decoding options that only count for responses."""


def main(argv: Sequence[str]) -> int:
    """Print every text with its mask tokens filled; on standard error, print tokens, time and passes."""
    parser = decoding_parser("infill", "Fill the mask tokens of each text.")
    parser.add_argument("texts", nargs="+", help="texts that contain the tokenizer's mask token, or what --blank names")
    parser.add_argument("--blank", default=None, help="what stands for one mask token in the texts, for example _")
    parser.add_argument(
        "--both_sides", action="store_true", help="use full attention, even where blocks hide what follows"
    )
    options, config, memory, (given,) = parse(parser, argv)
    for name in NOT_READ:
        if name in parser.given:
            raise ConfigError(
                f"{name}={parser.given[name]!r} has no effect: an infilling is as long as its text. Leave it out."
            )
    saved = saved_memory(options)
    decoder = load(options, memory, config, Display())
    if not options.mem_enabled:
        decoder = replace(decoder, memory=None)
    if given.both_sides:
        decoder = replace(decoder, attention_pattern=Full())
    texts = given.texts
    if given.blank is not None:
        texts = [text.replace(given.blank, decoder.tokenizer.mask_token) for text in texts]
    OwnWords(decoder.tokenizer, note).check(texts, "texts")
    generator = [derive("memdlm infill", options.seed, index) for index in range(len(texts))]
    job = decoder.prepare(texts, generator, infills=True)
    tally = Tally()
    with opened(readers_of(saved, decoder.model, decoder.tokenizer)):
        result = decode(job, tally, console=PlainConsole(stderr=True), trace=options.trace)
    for text in result.texts:
        say(text)
    note(tally.line())
    return 0
