"""Record a terminal picture: a note is written into a memory, and a chat reads it. Run it after `make demo`.

    pip install -e ".[docs]" && python docs/terminal.py

Real commands in a real terminal (a pty); nothing is edited but the width. The picture is docs/pictures/terminal.svg.
"""

import argparse
import io
import os
import pty
import select
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 98, 200
MODEL = "runs/demo/checkpoints/recall-learned-to-be-written-seed0"
NOTE = "Bring Hugo candles. The grass is green. Bring Anna tea. We walk home slowly. Bring Otto bread."
PATIENCE, PAUSE = 120.0, 1.5
"""Seconds to wait for a program's first output, and for more of it."""


class Terminal:
    """A screen on which commands are run."""

    def __init__(self) -> None:
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.stream = pyte.ByteStream(self.screen)

    def show(self, text: str) -> None:
        """Show what a user types at the shell's prompt."""
        # Long commands are typed on several lines, as in a script.
        lines = textwrap.wrap(text, COLUMNS - 6, break_long_words=False, break_on_hyphens=False)
        self.stream.feed(("$ " + " \\\r\n    ".join(lines) + "\r\n").encode())

    def run(self, command: str, typed: tuple[str, ...] = ()) -> None:
        """Run a command; when it has gone quiet, type the next line."""
        self.show(command)
        parent, child = pty.openpty()
        words = [sys.executable, "-m", "memdlm", *shlex.split(command)[1:]]
        size = {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
        process = subprocess.Popen(words, stdin=child, stdout=child, stderr=child, env={**os.environ, **size})
        os.close(child)
        waiting, quiet, limit = list(typed), time.monotonic(), PATIENCE
        while True:
            if select.select([parent], [], [], 0.1)[0]:
                try:
                    found = os.read(parent, 2**16)
                except OSError:  # the program has ended
                    break
                self.stream.feed(found)
                quiet, limit = time.monotonic(), PAUSE
            elif waiting and self.asks() and time.monotonic() - quiet > PAUSE:
                os.write(parent, f"{waiting.pop(0)}\n".encode())
                quiet, limit = time.monotonic(), PATIENCE
            elif not waiting and time.monotonic() - quiet > max(limit, PATIENCE):
                break
        if process.wait() != 0:
            raise SystemExit(f"{command}: exit status {process.returncode}")

    def asks(self) -> bool:
        """Whether the cursor stands behind a prompt."""
        return self.screen.display[self.screen.cursor.y].rstrip().endswith(">")

    def picture(self, title: str) -> str:
        """Return what stands on the screen as SVG."""
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        for line in lines:
            console.print(Text(line, style="bold" if line.startswith(("$ ", "> ")) else ""), highlight=False)
        return console.export_svg(title=title, unique_id="memdlm")


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/terminal.svg"))
    options = parser.parse_args()
    Path("note.txt").write_text(NOTE + "\n")
    terminal = Terminal()
    terminal.show("cat note.txt")
    terminal.stream.feed(f"{NOTE}\r\n".encode())
    terminal.run(f"memdlm memorize --model {options.model} --file note.txt --output note.mem --overwrite")
    chat = f"memdlm chat --model {options.model} --memory note.mem --max_new_tokens 2"
    terminal.run(chat, ("Bring Anna", "Bring Hugo", "/memory off", "Bring Anna", "/exit"))
    options.out.write_text(terminal.picture("memdlm"))


if __name__ == "__main__":
    main()
