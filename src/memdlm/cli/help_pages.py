"""The help pages of commands, shown without importing what the commands need.

Options are declared where they are read: in dataclasses and parsers that cost seconds to import. `help_pages.json` is
what those parsers say about themselves, written by `python tests/cli/test_help_pages.py` and compared with them by
that test; a page is laid out from it for the terminal at hand, by argparse as ever.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGES = Path(__file__).with_name("help_pages.json")
DEPENDS = {"train": ("transformers",)}
"""Commands with options that other packages declare, and those packages."""
_PARTS = ("option_strings", "dest", "nargs", "default", "choices", "required", "help", "metavar")


def page(command: str) -> str | None:
    """Return the help page of a command; None: only its own parser knows it, as with another transformers."""
    described = json.loads(PAGES.read_text(encoding="utf-8")).get(command)
    if described is None or described["made_with"] != installed(command):
        return None
    return laid_out(described)


def installed(command: str) -> dict[str, str]:
    """Return the versions of the packages that declare some of the command's options."""
    return {name: importlib.metadata.version(name) for name in DEPENDS.get(command, ())}


def describe(command: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return what the help page of `parser` is laid out from, as JSON has it."""
    group_of = {id(each): place for place, group in enumerate(parser._action_groups) for each in group._group_actions}
    return {
        "made_with": installed(command),
        **{name: getattr(parser, name) for name in ("prog", "usage", "description", "epilog")},
        "formatter": type(parser._get_formatter()).__name__,
        "groups": [[group.title, group.description] for group in parser._action_groups],
        "options": [
            {"group": group_of[id(action)]}
            | {name: _plain(getattr(action, name)) for name in _PARTS if getattr(action, name) is not None}
            for action in parser._actions
        ],
    }


def laid_out(described: dict[str, Any]) -> str:
    """Return the page, as wide as the terminal."""
    names = ("prog", "usage", "description", "epilog")
    parser = argparse.ArgumentParser(
        **{name: described[name] for name in names},
        formatter_class=getattr(argparse, described["formatter"]),
        add_help=False,
    )
    parser._action_groups.clear()
    groups = [parser.add_argument_group(title, description) for title, description in described["groups"]]
    for option in described["options"]:
        # argparse knows this word by identity.
        parts: dict[str, Any] = {
            name: argparse.SUPPRESS if option.get(name) == argparse.SUPPRESS else option.get(name) for name in _PARTS
        }
        groups[option["group"]]._add_action(_Shown(**parts))
    return parser.format_help()


class _Shown(argparse.Action):
    """An option that is only looked at."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is parsed by it."""
        raise AssertionError("a help page parses nothing")


def _plain(value: Any) -> Any:
    """Return what JSON can hold of `value` and argparse shows in the same words."""
    if isinstance(value, Iterable) and not isinstance(value, (str, type)):
        return [_plain(each) for each in value]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)
