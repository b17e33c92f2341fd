"""JSON from files that somebody may have edited: read strictly, and checked against what is expected."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from memdlm.options import shortened

MOST_BYTES = 2**26

Check: TypeAlias = Callable[[Any], bool]


def read_json(path: str | Path) -> Any:
    """Return what the file holds; raises OSError, or ValueError that says what is wrong.

    Besides text that is not JSON, it refuses duplicate keys, NaN and infinity, nesting too deep for Python, and files
    of more than `MOST_BYTES`.
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than {MOST_BYTES}")
    try:
        return json.loads(
            path.read_bytes().decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refused,
            parse_float=_real,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def is_whole(value: Any, least: int, most: int = 2**63 - 1) -> bool:
    """Whether `value` is an integer (True is not one) from `least` to `most`."""
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (True is not one)."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def is_text(value: Any) -> bool:
    """Whether `value` is a string."""
    return isinstance(value, str)


def is_digest(value: Any) -> bool:
    """Whether `value` is a SHA-256 as 64 hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def is_flag(value: Any) -> bool:
    """Whether `value` is true or false."""
    return isinstance(value, bool)


def is_list_of(check: Check) -> Check:
    """Return a check for lists of what passes `check`."""
    return lambda value: isinstance(value, list) and all(check(each) for each in value)


def is_object(value: Any) -> bool:
    """Whether `value` is an object."""
    return isinstance(value, dict)


def optional(check: Check) -> Check:
    """Return a check that null passes too."""
    return lambda value: value is None or check(value)


def one_of(*checks: Check) -> Check:
    """Return a check for what passes any of `checks`."""
    return lambda value: any(check(value) for check in checks)


def check_fields(found: Any, expected: Mapping[str, Check], where: str, *, may_lack: bool = False) -> dict[str, Any]:
    """Return `found`, an object with the `expected` fields and no others; raises ValueError for the first wrong.

    With `may_lack`, fields may be missing.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not an object")
    for name in found:
        if name not in expected:
            raise ValueError(f"{where} has an unknown field {name[:80]!r}")
    for name, check in expected.items():
        if name not in found and not may_lack:
            raise ValueError(f"{where} lacks {name!r}")
        if name in found and not check(found[name]):
            raise ValueError(f"{where}: {name} cannot be {_shown(found[name])}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"this {'object' if isinstance(value, dict) else 'list'} of {len(value)} entries"
    return shortened(value)
