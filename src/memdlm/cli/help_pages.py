"""The help pages of commands, shown without importing what the commands need.

Options are declared where they are read: in dataclasses and parsers that take seconds to import. `help_pages.json`
describes those parsers. `python tests/cli/test_help_pages.py` writes it, and the test of that name compares the two.
argparse lays a page out from it, as wide as the terminal.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGES = Path(__file__).with_name("help_pages.json")
DEPENDS = {"train": ("transformers",)}
"""Commands that have options from other packages, and those packages."""
_PARTS = ("option_strings", "dest", "nargs", "default", "choices", "required", "help", "metavar")


def page(command: str) -> str | None:
    """Return a command's help page; None if only its parser knows it (with another transformers version)."""
    described = json.loads(PAGES.read_text(encoding="utf-8")).get(command)
    if described is None or described["made_with"] != installed(command):
        return None
    return laid_out(described)


def installed(command: str) -> dict[str, str]:
    """Return the versions of the packages that declare some of the command's options."""
    return {name: importlib.metadata.version(name) for name in DEPENDS.get(command, ())}


def describe(command: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return all that the help page of `parser` is laid out from, as JSON values."""
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
        # argparse compares SUPPRESS by identity.
        parts: dict[str, Any] = {
            name: argparse.SUPPRESS if option.get(name) == argparse.SUPPRESS else option.get(name) for name in _PARTS
        }
        groups[option["group"]]._add_action(_Shown(**parts))
    return parser.format_help()


class _Shown(argparse.Action):
    """An option that is shown and never parsed."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise AssertionError: a help page parses nothing."""
        raise AssertionError("a help page parses nothing")


def _plain(value: Any) -> Any:
    """Return `value` in a form that JSON can hold and that argparse shows in the same words."""
    if isinstance(value, Iterable) and not isinstance(value, (str, type)):
        return [_plain(each) for each in value]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)
