"""The flags that generate, infill and chat share: for the model, for decoding and for the memory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm.cli.parsing import DataclassParser, Parser
from memdlm.errors import ConfigError, MemoryFileError
from memdlm.inference import PRESETS, GenerationConfig
from memdlm.memory import MemoryConfig
from memdlm.memory.files.library import find_memory
from memdlm.memory.flags import PREFIX, flags_of, memory_from_flags
from memdlm.memory.learned import saved_config
from memdlm.models.hub.loading import MEMORY_CONFIG_FILE
from memdlm.workflows.sessions.decoding import DecodingOptions, page_at

MemoryFlags = flags_of()
SWITCH = "--mem_enabled True"


def parse(
    parser: DataclassParser, argv: Sequence[str]
) -> tuple[DecodingOptions, GenerationConfig, MemoryConfig | None, tuple[Any, ...]]:
    """Parse flags of `decoding_parser`. Options of a preset and of a learned memory become the defaults."""
    refuse_old_switch(argv)
    defaults = decoding_defaults(argv) | learned_defaults(argv)
    options, config, flags, *others = parser.parse(defaults, argv)
    config.refuse_idle(parser.given)
    if options.trace is not None:
        # A bad path is refused here, before the model is loaded, and not after hours of decoding.
        with page_at(options.trace):
            pass
    memory = memory_from_flags(vars(flags), parser.given, is_on=options.mem_enabled, switch=SWITCH)
    return options, config, memory, tuple(others)


def decoding_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Return a preset's options. If only max_length is given, it replaces the default of max_new_tokens."""
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
    """Return, as mem_* flags, the options that the named model's memory was trained with; {} if it was not."""
    folder = _early(argv, "adapter") or _early(argv, "model")
    if folder is None or not (Path(folder) / MEMORY_CONFIG_FILE).is_file():
        return {}
    return {f"{PREFIX}{name}": value for name, value in dataclasses.asdict(saved_config(folder)).items()}


def _early(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of one flag, before the others can be parsed."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{flag}", default=None)
    value: str | None = getattr(first.parse_known_args(list(argv))[0], flag)
    return value


def decoding_parser(name: str, description: str, *more: type) -> DataclassParser:
    """Return the parser of one command; `more` are further option classes."""
    return DataclassParser(
        (DecodingOptions, GenerationConfig, MemoryFlags, *more),
        prog=f"memdlm {name}",
        description=f"{description} Presets: {', '.join(PRESETS)}.",
    )


def refuse_old_switch(argv: Sequence[str]) -> None:
    """Raise MemoryFileError unless the value of --memory is a saved memory: it once was a switch, without a value."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--memory", nargs="?", const="", default=None)
    found = first.parse_known_args(list(argv))[0].memory
    if found is None:
        return
    way_out = f"To write each prompt into memory, as --memory did before, add {SWITCH}."
    if not found:
        raise ConfigError(f"--memory takes the folder of a saved memory. {way_out}")
    try:
        find_memory(found)
    except MemoryFileError as error:
        raise MemoryFileError(f"{error} {way_out}") from error
