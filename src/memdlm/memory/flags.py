"""The options of a memory as flags, `mem_*`: on command lines, in recipes, and among an evaluation's arguments."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig, OuterConfig
from memdlm.options import as_flags, names_of

PREFIX = "mem_"
DEFAULTS = {name: field.default for name, _, field in as_flags(MemoryConfig, PREFIX)}
"""Every flag, and its value where nobody says anything."""


def flags_of(*names: str) -> type:
    """Return a dataclass of the flags `names` (none: of all), in the form that `HfArgumentParser` reads."""
    flags = [flag for flag in as_flags(MemoryConfig, PREFIX) if flag[0] in (names or DEFAULTS)]
    return dataclasses.make_dataclass("MemoryFlags", flags)


def unusual(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `flags` that differ from their defaults."""
    return {name: value for name, value in flags.items() if value != DEFAULTS[name]}


def memory_from_flags(
    flags: Mapping[str, Any],
    said: Mapping[str, Any],
    *,
    is_on: bool,
    trains: bool = False,
    switch: str = "mem_enabled=True",
) -> MemoryConfig | None:
    """Build the memory that `flags` describe, the others at their defaults; None: memory is off.

    `said` is what the user asked for, other options included: raises ConfigError for a flag there that nothing will
    read, because memory is off (`switch` turns it on) or because it is training's alone and nothing `trains`.
    """
    for name, value in said.items():
        if name in DEFAULTS and not is_on:
            raise ConfigError(f"{name}={value!r} has no effect without memory; add {switch}.")
        if name.removeprefix(PREFIX) in names_of(OuterConfig) and not trains:
            raise ConfigError(f"{name}={value!r} has no effect here: only training reads it. Leave it out.")
    if not is_on:
        return None
    return MemoryConfig(**{name.removeprefix(PREFIX): value for name, value in flags.items()})
