"""Typed records from JSON and back: a class's fields declare what is read, checked and written."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from memdlm.errors import DataError

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
AnyRecord = TypeVar("AnyRecord", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """An object of a JSON file. A field with a default may be missing there."""

    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Entries of the file besides the fields, kept unchanged."""


def checked(
    *,
    least: float = -math.inf,
    most: float = math.inf,
    per: str | None = None,
    may_be_empty: bool = False,
    once: Sequence[str] = (),
) -> Any:
    """Declare a field whose numbers lie between `least` and `most`.

    It must have as many values as the field `per`, or none with `may_be_empty`. No two of its rows may agree in all
    fields of `once`.
    """
    limits = {"least": least, "most": most, "per": per, "may_be_empty": may_be_empty, "once": tuple(once)}
    return dataclasses.field(metadata=limits)


def read(kind: type[AnyRecord], value: Any, field: str) -> AnyRecord:
    """Return `value` as a record. Raises DataError, which names the field, for a missing, wrong or non-JSON value."""
    record: AnyRecord = _read(kind, _json(value, field), field)
    return record


def plain(value: Any) -> Any:
    """Return a record, or a sequence of records, in JSON types."""
    if isinstance(value, Record):
        names = [each.name for each in dataclasses.fields(value) if each.name != "others"]
        found = {name: plain(getattr(value, name)) for name in names if getattr(value, name) is not None}
        return {**found, **value.others}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _json(value: Any, field: str) -> Any:
    """Return a copy in JSON types. Raises DataError for numbers that are not finite and keys that are not text."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise DataError(f"{field} has the key {key!r}: JSON keys are texts.")
        return {key: _json(inner, f"{field}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner, f"{field}[{index}]") for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{field} is {value}: a report holds finite numbers only. Leave out results that diverged.")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DataError(f"{field} is of type {type(value).__name__}, which JSON does not have. Convert it first.")


_kinds = cache(typing.get_type_hints)


def _read(kind: Any, value: Any, field: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):  # T | None: None only stands for a missing field
        return _read(inner[0], value, field)
    if origin is tuple:
        if not isinstance(value, list):
            raise DataError(f"{field} must be a list, got {value!r}.")
        return tuple(_read(inner[0], each, f"{field}[{index}]") for index, each in enumerate(value))
    if kind in _WORDS:
        possible = (int, float) if kind is float else kind
        if not isinstance(value, possible) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{field} must be {_WORDS[kind]}, got {value!r}.")
        return value
    if not isinstance(value, dict):
        raise DataError(f"{field} must be an object, got {value!r}.")
    if not dataclasses.is_dataclass(kind):
        return {key: _read(inner[1], each, f"{field}.{key}") for key, each in value.items()}
    return _record(kind, value, field)


def _record(kind: Any, value: dict[str, Any], field: str) -> Any:
    fields = {each.name: each for each in dataclasses.fields(kind) if each.name != "others"}
    for name, each in fields.items():
        if name not in value and each.default is dataclasses.MISSING:
            raise DataError(f"{field}.{name} is missing. {field} has: {', '.join(sorted(value))}.")
    kinds = _kinds(kind)
    found = {name: _read(kinds[name], each, f"{field}.{name}") for name, each in value.items() if name in fields}
    others = _read(kinds["others"], {name: each for name, each in value.items() if name not in fields}, field)
    for name, each in found.items():
        if fields[name].metadata:
            _check(each, f"{field}.{name}", found, **fields[name].metadata)
    return kind(**found, others=others)


def _check(
    value: Any,
    field: str,
    beside: Mapping[str, Any],
    *,
    least: float,
    most: float,
    per: str | None,
    may_be_empty: bool,
    once: tuple[str, ...],
) -> None:
    parent, _, name = field.rpartition(".")
    if per is not None and len(value) != len(beside[per]) and not (may_be_empty and not value):
        raise DataError(f"{field} has {len(value)} values for the {len(beside[per])} of {parent}.{per}.")
    seen: dict[tuple[Any, ...], int] = {}
    for index, each in enumerate(value if isinstance(value, tuple) else (value,)):
        if isinstance(each, int | float) and not least <= each <= most:
            limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            place = f"{field}[{index}]" if isinstance(value, tuple) else field
            raise DataError(f"{place} must be {limits}, got {each}.")
        first = seen.setdefault(tuple(getattr(each, key) for key in once), index) if once else index
        if first != index:
            same = ", ".join(f"{key} {getattr(each, key)!r}" for key in once)
            raise DataError(f"{field}[{index}] repeats {parent}.{name}[{first}]: {same}.")
