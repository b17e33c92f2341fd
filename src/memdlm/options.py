"""Options: declared once, as dataclass fields. Flags, checks and documentation are made from these."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, Literal, Optional, TypeVar, Union, get_args, get_origin, get_type_hints

from memdlm.errors import ConfigError, unknown

T = TypeVar("T")
if TYPE_CHECKING:

    class Defaulted(Generic[T]):
        """The type of an option that may be given as None, which stands for its default; it never holds None."""

        def __get__(self, instance: object, owner: type) -> T: ...
        def __set__(self, instance: object, value: T | None) -> None: ...
else:
    Defaulted = Optional
LARGEST = 2**63
"""Integers must be smaller than this: torch takes no larger ones."""


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    adjustable: bool = False,
    repeated: Literal["append", "extend"] | None = None,
) -> Any:
    """Declare a field: its default, its one-line help, and what values it may take.

    `above` and `below` are exclusive bounds, `minimum` and `maximum` inclusive ones. The value of an
    `adjustable` option may differ between training and later use. The flag of a `repeated` option, whose values are a
    tuple, may stand several times: with one value each (append), or with several (extend).
    """
    limits = {"choices": choices, "above": above, "minimum": minimum, "maximum": maximum, "below": below}
    facts = {"help": help, "limits": limits, "adjustable": adjustable, "repeated": repeated}
    return dataclasses.field(default=default, metadata=facts)


def names_of(config_class: type) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(config_class)]


def own_options_first(config_class: type[T]) -> type[T]:
    """List a dataclass's own options before those that it inherits; the decorator goes above `dataclass`."""
    known = dataclasses.fields(config_class)  # type: ignore[arg-type]
    ordered = sorted(known, key=lambda field: field.name not in config_class.__annotations__)
    config_class.__dataclass_fields__ = {field.name: field for field in ordered}  # type: ignore[attr-defined]
    return config_class


def validate(config: Any, prefix: str = "") -> None:
    """Check every field of a dataclass that was declared with `option`; raise ConfigError for the first bad one.

    Integers are accepted for floats. `prefix` is what users put before the field's name (`mem_`).
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if "limits" in field.metadata:
            check_value(prefix + field.name, getattr(config, field.name), hints[field.name], field.metadata["limits"])


def members_of(hint: Any) -> set[Any]:
    """Return the types that a type hint joins with `|`; the hint itself when it is one type."""
    return set(_members(hint))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def check_value(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `value` is of the type `hint`, finite, and within `limits`, which `option` names."""
    choices = limits.get("choices")
    allowed = tuple(get_origin(member) or member for member in _members(hint))
    if value is None and type(None) in allowed:
        return
    kinds = allowed
    if float in kinds:
        kinds = (*kinds, int)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ConfigError(f"{name} must be {wanted}, got {shortened(value)}.")
    if isinstance(value, tuple):
        element = next(get_args(member)[0] for member in _members(hint) if get_origin(member) is tuple)
        for each in value:
            check_value(f"every entry of {name}", each, element, {})
    _check_size(name, value)
    if choices is not None and value not in choices:
        raise ConfigError(unknown(f"{name}:", value, choices))
    for bound, holds, words in (
        ("above", lambda x, b: x > b, "greater than"),
        ("minimum", lambda x, b: x >= b, "at least"),
        ("maximum", lambda x, b: x <= b, "at most"),
        ("below", lambda x, b: x < b, "less than"),
    ):
        limit = limits.get(bound)
        if limit is not None and not holds(value, limit):
            raise ConfigError(f"{name} must be {words} {limit}, got {shortened(value)}.")


def _check_size(name: str, value: Any) -> None:
    """Refuse NaN, infinity, and integers that need more than 64 bits."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")
    if isinstance(value, int) and not -LARGEST <= value < LARGEST:
        raise ConfigError(f"{name} must fit into 64 bits, got {shortened(value)}.")


def shortened(value: Any, most: int = 80) -> str:
    """Return `value` as text for a one-line message, cut after `most` characters."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python may refuse to print it
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def as_flags(config_class: type, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (name, type, field) triples that put `config_class`'s options, with the prefix, into another dataclass.

    The result is what `dataclasses.make_dataclass` takes, in the form that `HfArgumentParser` reads.
    """
    hints = get_type_hints(config_class)
    flags = []
    for field in dataclasses.fields(config_class):
        help_text = field.metadata["help"]
        choices = field.metadata["limits"]["choices"]
        if choices is not None:
            help_text += f" One of: {', '.join(choices)}."
        repeated = field.metadata.get("repeated")
        metadata = {"help": help_text.replace("%", "%%"), **({} if repeated is None else {"action": repeated})}
        flags.append(
            (
                prefix + field.name,
                _as_list(hints[field.name], is_one=repeated == "append"),
                dataclasses.field(default=field.default, metadata=metadata),
            )
        )
    return flags


def _as_list(hint: Any, *, is_one: bool = False) -> Any:
    """Return list[X] for tuple[X, ...] (or None): a flag with several values is a list to the parser.

    A flag that `is_one` value each time it stands there is an X to the parser, which collects them.
    """
    for member in _members(hint):
        if get_origin(member) is tuple:
            element = get_args(member)[0]
            return element | None if is_one else list[element]  # type: ignore[valid-type]
    return hint


def flag_class(config_class: type) -> type:
    """Return a dataclass with `config_class`'s options in the form that `HfArgumentParser` reads."""
    return dataclasses.make_dataclass(config_class.__name__, as_flags(config_class), kw_only=True)


def is_config(config_class: type) -> bool:
    """Whether every field of a dataclass was declared with `option`."""
    return all("limits" in field.metadata for field in dataclasses.fields(config_class))


def from_flags(config_class: type[T], values: Any, prefix: str = "") -> T:
    """Build `config_class` from the prefixed attributes of `values` (the inverse of `as_flags`)."""
    return config_class(**{name: getattr(values, prefix + name) for name in names_of(config_class)})


def from_mapping(config_class: type[T], values: Mapping[str, Any], what: str) -> T:
    """Build `config_class` from a mapping; unknown keys raise ConfigError with the nearest known one."""
    for key in values:
        if key not in names_of(config_class):
            raise ConfigError(unknown(f"{what} option", key, names_of(config_class)))
    return config_class(**values)
