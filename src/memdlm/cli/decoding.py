"""The flags that generate, infill and chat share: what is decoded with, how, and the memory's own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm.cli.parsing import DataclassParser, Parser
from memdlm.errors import ConfigError
from memdlm.inference import PRESETS, GenerationConfig
from memdlm.memory import MemoryConfig
from memdlm.memory.config import TRAINER_OPTIONS
from memdlm.memory.learned import saved_config
from memdlm.models.hub.loading import MEMORY_CONFIG_FILE
from memdlm.options import as_flags, from_flags
from memdlm.workflows.sessions.decoding import DecodingOptions, page_at

MemoryFlags = dataclasses.make_dataclass("MemoryFlags", as_flags(MemoryConfig, "mem_"))


def parse(
    parser: DataclassParser, argv: Sequence[str]
) -> tuple[DecodingOptions, GenerationConfig, MemoryConfig, tuple[Any, ...]]:
    """Parse flags of `decoding_parser`; a preset's options, and a learned memory's, are the defaults of the others."""
    defaults = decoding_defaults(argv) | learned_defaults(argv)
    options, config, memory, *others = parser.parse(defaults, argv)
    config.refuse_idle(parser.given)
    if options.trace is not None:
        # Refused before the model is loaded, not after hours of decoding.
        with page_at(options.trace):
            pass
    return options, config, memory_of(parser, memory, is_on=options.mem_enabled), tuple(others)


def memory_of(parser: DataclassParser, flags: Any, *, is_on: bool) -> MemoryConfig:
    """Build the memory's options from its parsed flags; raises ConfigError for a flag that nothing will read."""
    for name, value in parser.given.items():
        if not name.startswith("mem_") or name == "mem_enabled":
            continue
        if not is_on:
            raise ConfigError(f"{name}={value!r} has no effect without memory; add --mem_enabled True.")
        if name.removeprefix("mem_") in TRAINER_OPTIONS:
            raise ConfigError(f"{name}={value!r} has no effect here: only training reads it. Leave it out.")
    return from_flags(MemoryConfig, flags, "mem_")


def decoding_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Return a preset's options; a length in all, where it is given, stands in for that of the response."""
    found = preset_defaults(argv)
    if _early(argv, "max_length") is not None and _early(argv, "max_new_tokens") is None:
        found["max_new_tokens"] = None
    return found


def preset_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Return the options of the preset that the flags name."""
    preset = _early(argv, "preset")
    if preset is None:
        return {}
    chosen, plain = GenerationConfig.preset(preset), GenerationConfig()
    names = [each.name for each in dataclasses.fields(plain)]
    return {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(plain, name)}


def learned_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Return, as mem_* flags, what the memory of the named model was trained with, if it was trained."""
    folder = _early(argv, "adapter") or _early(argv, "model")
    if folder is None or not (Path(folder) / MEMORY_CONFIG_FILE).is_file():
        return {}
    return {f"mem_{name}": value for name, value in dataclasses.asdict(saved_config(folder)).items()}


def _early(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of one flag, before the others can be parsed."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{flag}", default=None)
    value: str | None = getattr(first.parse_known_args(list(argv))[0], flag)
    return value


def decoding_parser(name: str, description: str, *more: type) -> DataclassParser:
    """Return the parser of one command; `more` are further option classes."""
    parser = DataclassParser(
        (DecodingOptions, GenerationConfig, MemoryFlags, *more),
        prog=f"memdlm {name}",
        description=f"{description} Presets: {', '.join(PRESETS)}.",
    )
    parser.add_argument("--memory", dest="mem_enabled", action="store_const", const=True, help="same as --mem_enabled")
    return parser
