"""Make text of models, files and users safe to show: characters that would steer a terminal become escapes."""

import json
import re
from typing import Any

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
r"""Control characters except \n and \t, characters that turn the direction of text, and halves of surrogate pairs."""


def printable(text: str) -> str:
    r"""Return `text` with everything that steers a terminal written as an escape: \x1b, \u202e."""
    return _STEERING.sub(lambda found: _escape(ord(found[0])), text)


def one_line(text: str) -> str:
    """Return `text`, safe to show, on one line: runs of white space become one space."""
    return printable(" ".join(text.split()))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON that is safe to show and gives `value` again when it is read."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
