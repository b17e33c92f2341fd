"""The grammar of `--dataset_args`: which datasets, how much of each, and in what order.

args  := spec (("+" | "|") spec)*
spec  := name [ "[" entry ("," entry)* "]" ]        tatsu-lab/alpaca[train:5_000,test:100]
entry := key ":" value                              a split and its number of rows, or name/lang and a word
name  := a hub id or path; in single or double quotes if it holds + | [ ] or quotes itself
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from memdlm.errors import DataError
from memdlm.files import under_base

BASE_VARIABLE = "BASE_DATASETS_DIR"

SELECTORS = ("name", "lang")
"""Keys whose value is a word: the configuration of a hub dataset, the programming language of opc-sft."""
NUMBER = re.compile(r"[0-9]+(_[0-9]+)*")
QUOTED = re.compile(r"\s*(?P<quote>['\"])(?P<name>(?:(?!(?P=quote)).)*)(?P=quote)\s*")


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One dataset of a mixture."""

    name: str
    """Hub id, or path of a file or folder."""
    limits: dict[str, int] = field(default_factory=dict)
    """Number of rows per split, in the order written."""
    selectors: dict[str, str] = field(default_factory=dict)
    """Values of `name` and `lang`, where given."""

    @property
    def path(self) -> Path:
        """Return where the dataset is if it is local: as named, or below BASE_DATASETS_DIR."""
        return under_base(self.name, BASE_VARIABLE)

    def __str__(self) -> str:
        """Write the spec so that `parse_specs` reads it back."""
        name = self.name
        if not name or name != name.strip() or any(mark in name for mark in "+|[]'\""):
            quote = '"' if "'" in name else "'"
            name = f"{quote}{name}{quote}"
        entries = [f"{key}:{value}" for key, value in (*self.selectors.items(), *self.limits.items())]
        return f"{name}[{','.join(entries)}]" if entries else name


def parse_specs(text: str) -> list[DatasetSpec]:
    """Return the datasets of a mixture, in order; white space and empty pieces are dropped.

    Raises DataError, which names the piece, for an entry without a colon, a repeated key, a split whose value is no
    number of rows, brackets or quotes that do not close, anything after the brackets, and a text without any dataset.
    """
    specs = [_parse(piece) for piece in _pieces(text) if piece.strip()]
    if not specs:
        raise DataError(f"dataset_args: {text!r} names no dataset.")
    return specs


def _pieces(text: str) -> list[str]:
    """Cut at + and | outside quotes and brackets."""
    pieces, current, closing = [], "", ""
    for place, letter in enumerate(text):
        opens = {"[": "]", "'": "'", '"': '"'}.get(letter, "")
        if not closing and letter in "+|":
            pieces.append(current)
            current = ""
            continue
        if closing:
            closing = "" if letter == closing else closing
        # A quote opens a quoted name only at its beginning; elsewhere it is a letter of an unquoted name.
        elif opens and (letter == "[" or not current.strip()):
            closing = opens
        current += letter
        if closing and place == len(text) - 1:
            raise DataError(f"dataset_args: {closing!r} is missing at the end of {current.strip()!r}.")
    return [*pieces, current]


def _parse(piece: str) -> DatasetSpec:
    quoted = QUOTED.match(piece)
    if quoted:
        name, rest = quoted["name"], piece[quoted.end() :]
    else:
        name, bracket, rest = piece.partition("[")
        rest = bracket + rest
    name, rest = name if quoted else name.strip(), rest.strip()
    if not name:
        raise DataError(f"dataset_args: {piece.strip()!r} has no dataset before its brackets.")
    if rest and not (rest.startswith("[") and rest.endswith("]") and "]" not in rest[:-1]):
        raise DataError(
            f"dataset_args: {rest!r} in {piece.strip()!r} is not understood; brackets come last: name[train:100]. "
            "Put a name that holds brackets, + or | in quotes."
        )
    limits: dict[str, int] = {}
    selectors: dict[str, str] = {}
    for entry in filter(str.strip, rest[1:-1].split(",")):
        key, colon, value = (part.strip() for part in entry.partition(":"))
        if not colon or not key or not value:
            raise DataError(f"dataset_args: {entry.strip()!r} in {piece.strip()!r} is not of the form key:value.")
        if key in limits or key in selectors:
            raise DataError(f"dataset_args: {key!r} is given twice in {piece.strip()!r}.")
        if key in SELECTORS:
            selectors[key] = value
        elif NUMBER.fullmatch(value) and int(value) > 0:
            limits[key] = int(value)
        else:
            raise DataError(
                f"dataset_args: {key}:{value} in {piece.strip()!r}: the rows of a split are a whole number above 0, as "
                f"in train:10_000. Words are possible for {' and '.join(SELECTORS)} only."
            )
    return DatasetSpec(name, limits, selectors)
