"""What commands print with: control characters are made visible, so that no text steers the terminal."""

import sys

from memdlm.terminal import printable


def say(text: str, *, flush: bool = False) -> None:
    """Print `text` and a line end on standard output."""
    print(printable(text), flush=flush)


def note(text: str) -> None:
    """Print `text` and a line end on standard error."""
    print(printable(text), file=sys.stderr)
