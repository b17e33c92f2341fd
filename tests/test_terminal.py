"""What models, files and users say is shown and never obeyed: by the terminal, by rich, by the log."""

import io
import json
import logging

import pytest

from memdlm.cli.border import guarded
from memdlm.terminal import json_text, one_line, printable
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("a\rb\x08", "a\\x0db\\x08"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("half \ud83d", "half \\ud83d"),
        ("line\n\ttab \u00e9 \U0001f600 \u05d0\u200f", "line\n\ttab \u00e9 \U0001f600 \u05d0\u200f"),
    ],
)
def test_what_steers_a_terminal_is_seen(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_json_is_shown_and_reads_back():
    value = {"a": "\x1b[0m \x9b \x7f \u202e \ud83d \u00e9"}
    text = json_text(value)
    assert json.loads(text) == value
    assert printable(text) == text


def test_an_error_is_one_line():
    assert one_line("a\nb \x1b c\r\n") == "a b \\x1b c"


@pytest.mark.parametrize(
    "name", ["report [draft].txt", "a [/b].txt", "[red]x", ":bug:.txt", "[link=file:///x]y[/link]"]
)
def test_rich_reads_nothing_into_a_name(name):
    console = PlainConsole(file=io.StringIO(), width=200)
    console.print(name)
    console.print(_table(name))
    assert console.file.getvalue().count(name) == 3


def _table(name):
    from rich.table import Table

    table = Table(title=name, show_header=False)
    table.add_row(name)
    return table


def test_bars_and_messages_are_plain_too():
    console = PlainConsole(file=io.StringIO(), width=200)
    display = Display(console)
    display.say("[bold] :bug: \x1b[2J")
    with display.bar("phase", "[/] \x1b[2J", 1) as advance:
        advance(1)
    shown = console.file.getvalue()
    assert "[bold] :bug: \\x1b[2J" in shown
    assert "[/] \\x1b[2J" in shown
    assert "\x1b[2J" not in shown


def test_logs_of_libraries_are_plain(capsys):
    def run(argv):
        handler = logging.StreamHandler()
        logging.getLogger("memdlm.somewhere").addHandler(handler)
        logging.getLogger("memdlm.somewhere").warning("the file says %s", "\x1b[2J")
        logging.getLogger("memdlm.somewhere").removeHandler(handler)
        return 0

    assert guarded("memdlm", ["x"], run) == 0
    assert "the file says \\x1b[2J" in capsys.readouterr().err
