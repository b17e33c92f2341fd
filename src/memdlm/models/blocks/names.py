"""Module names: ours, which are the same for every family, and those of published checkpoints and adapters.

A table pairs fragments of the two, in the order in which a published name is rewritten. A fragment that starts with a
dot comes directly after a layer's index. Any other fragment begins a name, or follows a dot.
"""

import re
from collections.abc import Sequence
from typing import TypeAlias

from transformers.core_model_loading import WeightRenaming

NameTable: TypeAlias = Sequence[tuple[str, str]]
"""Pairs (published fragment, our fragment)."""


def renamings(table: NameTable) -> tuple[WeightRenaming, ...]:
    """Return the table as what transformers applies when loading, and backwards when saving."""
    return tuple(WeightRenaming(_pattern(published), _pattern(ours)) for published, ours in table)


def to_published(path: str, table: NameTable) -> str:
    """Return the published name of our module or tensor `path`."""
    path += "."  # fragments end with a dot, so the last part of a module's name needs one
    for published, ours in reversed(table):
        path = re.sub(_pattern(ours), published, path, count=1)
    return path.removesuffix(".")


def _pattern(fragment: str) -> str:
    # transformers drops the look-behind where a pattern serves as replacement.
    return (r"(?<=\d)" if fragment.startswith(".") else r"(?<!\w)") + re.escape(fragment)
