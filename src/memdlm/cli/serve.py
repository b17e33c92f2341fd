"""`memdlm serve --model MODEL --memories FOLDER`: answer requests over HTTP, as OpenAI's API does."""

from collections.abc import Sequence

from memdlm.cli.decoding import MemoryFlags, decoding_defaults, learned_defaults
from memdlm.cli.parsing import DataclassParser
from memdlm.inference import PRESETS, GenerationConfig
from memdlm.memory.flags import memory_from_flags
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.serve import ServeOptions, serve


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = serve_parser()
    options, config, flags = parser.parse(decoding_defaults(argv) | learned_defaults(argv), argv)
    config.refuse_idle(parser.given)
    memory = memory_from_flags(
        vars(flags), parser.given, is_on=options.memories is not None, switch="--memories FOLDER"
    )
    serve(options, config, memory, Display())
    return 0


def serve_parser() -> DataclassParser:
    """Return the command's parser."""
    return DataclassParser(
        (ServeOptions, GenerationConfig, MemoryFlags),
        prog="memdlm serve",
        description="Serve a model and its memories over HTTP, under OpenAI's routes, with a page at /. Options of "
        f"decoding are defaults, which requests may change. Presets: {', '.join(PRESETS)}.",
    )
