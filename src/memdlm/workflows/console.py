"""Where rich shows something: names and texts stand there as they are, never read as markup, emoji or commands."""

from typing import Any

from rich.console import Console
from rich.text import Text

from memdlm.terminal import printable


class PlainConsole(Console):
    """A console that reads nothing into a text: square brackets, colons and control sequences are shown."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn `text` into what is shown; titles, cells of tables and printed texts all come through here."""
        return super().render_str(printable(text), **options)
