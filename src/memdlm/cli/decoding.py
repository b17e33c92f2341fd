"""The flags that generate, infill and chat share: what is decoded with, how, and the memory's own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from memdlm.cli.parsing import DataclassParser, Parser
from memdlm.inference import PRESETS, GenerationConfig
from memdlm.memory import MemoryConfig
from memdlm.options import as_flags, from_flags
from memdlm.workflows.decoding import DecodingOptions

MemoryFlags = dataclasses.make_dataclass("MemoryFlags", as_flags(MemoryConfig, "mem_"))


def parse(
    parser: DataclassParser, argv: Sequence[str]
) -> tuple[DecodingOptions, GenerationConfig, MemoryConfig, tuple[Any, ...]]:
    """Parse flags of `decoding_parser`; a preset's options are the defaults of the others."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=None)
    preset = first.parse_known_args(list(argv))[0].preset
    defaults: dict[str, Any] = {}
    if preset is not None:
        chosen, plain = GenerationConfig.preset(preset), GenerationConfig()
        names = [each.name for each in dataclasses.fields(plain)]
        defaults = {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(plain, name)}
    options, config, memory, *others = parser.parse(defaults, argv)
    return options, config, from_flags(MemoryConfig, memory, "mem_"), tuple(others)


def decoding_parser(name: str, description: str, *more: type) -> DataclassParser:
    """Return the parser of one command; `more` are further option classes."""
    parser = DataclassParser(
        (DecodingOptions, GenerationConfig, MemoryFlags, *more),
        prog=f"memdlm {name}",
        description=f"{description} Presets: {', '.join(PRESETS)}.",
    )
    parser.add_argument("--memory", dest="mem_enabled", action="store_const", const=True, help="same as --mem_enabled")
    return parser
