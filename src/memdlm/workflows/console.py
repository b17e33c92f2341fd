"""A rich console that shows names and texts unchanged: it reads no markup, emoji or control sequences."""

from typing import Any

from rich.console import Console
from rich.text import Text

from memdlm.terminal import printable


class PlainConsole(Console):
    """A console that interprets nothing in a text: square brackets, colons and control sequences are shown."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return `text` as it is shown; rich calls this for titles, table cells and printed texts."""
        return super().render_str(printable(text), **options)
