"""Parsers that report mistakes as ConfigError: one line that names the flag, the value and the way out."""

import argparse
import re
from typing import Any, NoReturn

from memdlm.cli import help_pages, names
from memdlm.cli.output import say
from memdlm.errors import ConfigError, did_you_mean


class OneLine(argparse.ArgumentParser):
    """What all parsers share: short help pages, published option names, and errors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: dict[str, Any] = {}
        """By name, the values that flags gave in the last parse; defaults are not included."""
        if self.add_help:
            self.add_argument(help_pages.ALL, action=_HelpAll, help="show all options and exit")

    def format_help(self, *, everything: bool = False) -> str:
        """Return the help page: the options that matter first, or all of them."""
        return help_pages.laid_out(help_pages.describe(self), everything=everything)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as usual, with published names translated, and note the given flags in `given`."""
        self.given = {}
        flags = [flag for action in self._actions for flag in action.option_strings]
        return super().parse_known_args(None if args is None else names.translated(args, flags), namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse calls this once for every flag on the command line, however the flag is spelled.
        value = super()._get_values(action, arg_strings)
        if action.option_strings:
            told = action.const if action.nargs == 0 else value
            if action.dest in self.given and self.given[action.dest] != told and not is_collecting(action):
                self.error(
                    f"{action.option_strings[0]} is given twice, {self.given[action.dest]!r} and {told!r}: only one "
                    "would count. Leave one out"
                )
            self.given[action.dest] = told
        return value

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the whole usage."""
        match = re.match(r"unrecognized arguments: (\S+)", message)
        if match:
            flags = [flag for action in self._actions for flag in action.option_strings]
            flag = match[1].split("=")[0]
            message = f"option {match[1]!r} is not known.{names.instead(flag) or did_you_mean(flag, flags)}"
        end = "" if message.endswith("?") else "."
        raise ConfigError(f"{message.rstrip('.')}{end} {self.prog} {help_pages.ALL} lists the options.")


class Parser(OneLine):
    """A plain argument parser."""


class _HelpAll(argparse.Action):
    """Prints the whole help page, and exits as --help does."""

    def __init__(self, option_strings: list[str], dest: str, default: Any = None, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Print and exit."""
        assert isinstance(parser, OneLine)
        say(parser.format_help(everything=True).removesuffix("\n"))
        parser.exit()


def is_collecting(action: argparse.Action) -> bool:
    """Whether a flag may be repeated because its values are collected."""
    return not isinstance(action, (argparse._StoreAction, argparse._StoreConstAction))
