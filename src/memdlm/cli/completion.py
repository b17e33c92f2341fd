"""`memdlm completion SHELL`: print a script that completes commands, options and recipes."""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

import shtab

from memdlm.cli import help_pages, recipes
from memdlm.cli.output import say
from memdlm.cli.parsers import Parser

SHELLS = ("bash", "zsh", "tcsh")
USE = (
    'Use it at once, in bash: eval "$(memdlm completion bash)". For every new shell, put this line into ~/.bashrc. '
    "In zsh, after compinit: memdlm completion zsh > a folder of $fpath, as the file _memdlm. "
    "In tcsh: memdlm completion tcsh > a file, and source it in ~/.tcshrc."
)
_COMMAND = "COMMAND"
_NUMBERS = (help_pages.NUMBER, help_pages.REAL)


def main(argv: Sequence[str]) -> int:
    """Print the script."""
    parser = Parser(prog="memdlm completion", description="Print a script for a shell's completion.", epilog=USE)
    parser.add_argument("shell", choices=SHELLS, help="shell that reads the script")
    options = parser.parse_args(list(argv))
    say(shtab.complete(_all_commands(), shell=options.shell))
    return 0


def _all_commands() -> argparse.ArgumentParser:
    """Return one parser with all commands, made from the stored help pages: nothing slow is imported."""
    root = argparse.ArgumentParser(prog="memdlm")
    commands = root.add_subparsers(dest="command", metavar=_COMMAND)
    for name, described in help_pages.stored().items():
        command = commands.add_parser(name, help=described["description"], add_help=False)
        for option in described["options"]:
            command._add_action(_completed(help_pages.shown(option), option, name))
    commands.add_parser("help", help="show the first options of a command", add_help=False).add_argument(
        "topic", choices=list(help_pages.stored())
    )
    return root


def _completed(action: Any, option: dict[str, Any], command: str) -> argparse.Action:
    if (command, action.dest) == ("train", "recipe"):
        action.complete = _recipe()
    elif (command, action.dest) == ("recipes", "name"):
        action.choices = recipes.names()
    elif option.get("metavar") == help_pages.SWITCH:
        action.choices = ["True", "False"]
    elif action.nargs != 0 and action.choices is None and option.get("metavar") not in _NUMBERS:
        action.complete = shtab.FILE
    return action


def _recipe() -> dict[str, Any]:
    """Complete names of recipes; in bash, files as well."""
    names = shlex.join(recipes.names())
    return {
        "bash": "_memdlm_recipes",
        "zsh": f"({names})",
        "tcsh": "f",
        "preamble": {"bash": f'_memdlm_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}'},
    }
