"""The help pages that are shown without the parsers are the parsers' own: one source of truth, checked.

`python tests/cli/test_help_pages.py` writes them anew.
"""

import importlib
import json
import re
import subprocess
import sys

import pytest

from memdlm.cli import help_pages
from memdlm.cli.main import COMMANDS, main
from memdlm.cli.parsers import OneLine

WRITE = "run: python tests/cli/test_help_pages.py"


class Caught(Exception):
    def __init__(self, parser):
        self.parser = parser


def parser_of(command, patch):
    def caught(self, file=None):
        raise Caught(self)

    with patch.context() as here:
        here.setattr(OneLine, "print_help", caught)
        try:
            importlib.import_module(f"memdlm.cli.{command.replace('-', '_')}").main(["--help"])
        except Caught as found:
            return found.parser
    raise AssertionError(f"{command} --help shows no page")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [60, 100, 200])
def test_pages_are_those_of_the_parsers(command, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    parser = parser_of(command, monkeypatch)
    stored = json.loads(help_pages.PAGES.read_text())
    made = json.loads(json.dumps(help_pages.describe(parser)))
    assert help_pages.laid_out(made) == parser.format_help()
    if stored[command]["made_with"] == help_pages.installed(command):
        assert stored[command] == made, WRITE


def test_every_command_has_a_page_and_no_other():
    assert list(json.loads(help_pages.PAGES.read_text())) == list(COMMANDS), WRITE


@pytest.mark.parametrize("command", COMMANDS)
def test_a_first_page_fits_two_screens_and_help_all_has_every_option(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([command, flag])
        shown[flag] = capsys.readouterr().out
    assert len(shown["--help"].splitlines()) <= 48
    described = json.loads(help_pages.PAGES.read_text())[command]
    flags = [each["option_strings"][0] for each in described["options"] if each["option_strings"]]
    flags.remove("--help-all")
    lines = shown["--help-all"].splitlines()
    assert all(any(line.strip().startswith((f"{flag} ", f"{flag},", flag)) for line in lines) for flag in flags)
    first = help_pages.FIRST.get(command, ())
    assert len(first) <= 10
    assert {f"--{name}" for name in first} <= set(flags)
    assert (f"memdlm {command} --help-all lists" in " ".join(shown["--help"].split())) == bool(first)


def test_a_first_page_starts_with_the_options_in_order(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["help", "train"])
    found = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)
    assert tuple(found) == help_pages.FIRST["train"]


@pytest.mark.parametrize("words", [["help"], ["--help"], ["-h"], []])
def test_help_alone_lists_the_commands(words, capsys):
    assert main(words) == 0
    assert all(f"  {command} " in capsys.readouterr().out for command in ["train"])
    assert main(["help", "nothing"]) == 2
    assert "command 'nothing' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
def test_help_imports_neither_torch_nor_transformers(flag):
    for command in COMMANDS:
        if help_pages.page(command) is None:  # made with another transformers
            continue
        code = f"""
import sys
from memdlm.cli.main import main
try:
    main([{command!r}, {flag!r}])
except SystemExit as end:
    assert end.code == 0
sys.exit(any(each in sys.modules for each in ("torch", "transformers", "peft", "numpy", "rich")))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: memdlm {command}")


def test_options_of_another_transformers_are_asked_of_the_parser(monkeypatch, capsys):
    monkeypatch.setattr(help_pages.importlib.metadata, "version", lambda name: "5.99")
    assert help_pages.page("train") is None
    assert help_pages.page("generate") is not None
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--learning_rate" in capsys.readouterr().out


if __name__ == "__main__":
    found = {each: help_pages.describe(parser_of(each, pytest.MonkeyPatch())) for each in COMMANDS}
    help_pages.PAGES.write_text(json.dumps(found, indent=1) + "\n")
