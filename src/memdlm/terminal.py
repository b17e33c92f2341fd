"""Text of models, files and users, made fit to show: what would steer a terminal is seen instead of obeyed."""

import json
import re
from typing import Any

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
r"""Control characters except \n and \t, what turns the direction of text, and halves of surrogate pairs."""


def printable(text: str) -> str:
    r"""Return `text` with everything that steers a terminal written as an escape: \x1b, \u202e."""
    return _STEERING.sub(lambda found: _escape(ord(found[0])), text)


def one_line(text: str) -> str:
    """Return `text` fit to show, on one line: runs of white space are one space."""
    return printable(" ".join(text.split()))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON, fit to show and equal to `value` when it is read again."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
