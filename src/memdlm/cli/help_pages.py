"""The help pages of commands, shown without importing what the commands need.

Options are declared where they are read: in dataclasses and parsers that take seconds to import. `help_pages.json`
describes those parsers. `python tests/cli/test_help_pages.py` writes it, and the test of that name compares the two.
A page shows the options that matter first; `--help-all` shows all of them, in groups.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGES = Path(__file__).with_name("help_pages.json")
ALL = "--help-all"
DEPENDS = {"train": ("transformers",)}
"""Commands that have options from other packages, and those packages."""
FIRST: dict[str, tuple[str, ...]] = {
    "train": (
        *("model", "dataset_args", "output_dir", "load_in_4bit", "lora", "learning_rate", "num_train_epochs"),
        *("per_device_train_batch_size", "mem_enabled", "dry_run"),
    ),
    "generate": (
        *("model", "adapter", "chat", "max_new_tokens", "steps", "temperature", "mem_enabled", "memory", "preset"),
        "device",
    ),
    "infill": (
        *("model", "adapter", "blank", "both_sides", "steps", "temperature", "mem_enabled", "memory", "preset"),
        "device",
    ),
    "chat": (
        *("model", "adapter", "system", "max_new_tokens", "steps", "temperature", "mem_enabled", "memory", "preset"),
        "device",
    ),
    "memorize": ("model", "adapter", "file", "output", "joined", "gate", "compress_rank", "overwrite", "device"),
    "ask": (
        *("model", "adapter", "memory", "questions", "output", "keep_context", "max_new_tokens", "steps", "preset"),
        "device",
    ),
    "serve": (
        *(
            "model",
            "adapter",
            "memories",
            "host",
            "port",
            "api_key_file",
            "slots",
            "max_new_tokens",
            "preset",
            "device",
        ),
    ),
    "eval": (
        *("model", "adapter", "tasks", "mem_enabled", "memory", "max_new_tokens", "steps", "block_size", "max_length"),
        "device",
    ),
    "exposure-bias": (
        *("model", "model2", "dataset_args", "split", "num_samples", "steps", "output", "mem_enabled", "batch_size"),
        "device",
    ),
}
"""By command, the options of its first page. A command that is not here shows all its options there."""
_PARTS = ("option_strings", "dest", "nargs", "default", "choices", "required", "help", "metavar")
NUMBER, REAL, SWITCH, TEXT = "N", "X", "BOOL", "VALUE"
"""What stands for the value of an option."""
_WORDS = {"int": NUMBER, "float": REAL, "string_to_bool": SWITCH}


def page(command: str, *, everything: bool = False) -> str | None:
    """Return a command's help page; None if only its parser knows it (with another transformers version)."""
    described = stored().get(command)
    if described is None or described["made_with"] != installed(command):
        return None
    return laid_out(described, everything=everything)


def stored() -> dict[str, dict[str, Any]]:
    """Return the stored description of every command's parser."""
    found: dict[str, dict[str, Any]] = json.loads(PAGES.read_text(encoding="utf-8"))
    return found


def installed(command: str) -> dict[str, str]:
    """Return the versions of the packages that declare some of the command's options."""
    return {name: importlib.metadata.version(name) for name in DEPENDS.get(command, ())}


def describe(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return all that the help pages of `parser` are laid out from, as JSON values."""
    group_of = {id(each): place for place, group in enumerate(parser._action_groups) for each in group._group_actions}
    command = parser.prog.partition(" ")[2]
    return {
        "made_with": installed(command),
        "command": command,
        **{name: getattr(parser, name) for name in ("prog", "usage", "description", "epilog")},
        "groups": [[group.title, group.description] for group in parser._action_groups],
        "options": [
            {"group": group_of[id(action)], **_described(action)}
            for action in parser._actions
            if action.help != argparse.SUPPRESS
        ],
    }


def _described(action: argparse.Action) -> dict[str, Any]:
    found = {name: _plain(getattr(action, name)) for name in _PARTS if getattr(action, name) is not None}
    kind = _WORDS.get(getattr(action.type, "__name__", ""))
    if action.option_strings and action.nargs != 0 and action.metavar is None and action.choices is None:
        found["metavar"] = kind or TEXT
    return found


def laid_out(described: dict[str, Any], *, everything: bool = False) -> str:
    """Return the first page, or the one of all options, as wide as the terminal."""
    options = [each for each in described["options"] if each.get("option_strings") != [ALL]]
    chosen = [each for each in options if everything or is_first(each, described["command"])]
    hidden = len(options) - len(chosen)
    more = f"{described['prog']} {ALL} lists all {len(options)} options." if hidden else None
    parser = argparse.ArgumentParser(
        prog=described["prog"],
        usage=described["usage"] or _usage(described),
        description=described["description"],
        epilog=" ".join(text for text in (described["epilog"], more) if text) or None,
        formatter_class=_Formatter,
        add_help=False,
    )
    parser._action_groups.clear()
    groups = [parser.add_argument_group(title, text) for title, text in described["groups"]]
    # On a first page, groups would be longer than what is in them.
    optional = next(place for place, (title, _) in enumerate(described["groups"]) if title == "options")
    for option in chosen if everything else sorted(chosen, key=lambda each: _rank(each, described["command"])):
        is_one_list = not everything and hidden and option["option_strings"]
        groups[optional if is_one_list else option["group"]]._add_action(shown(option))
    return parser.format_help()


def is_first(option: dict[str, Any], command: str) -> bool:
    """Whether an option is on the first page of its command."""
    if command not in FIRST or option.get("required") or not option["option_strings"]:
        return True
    return any(flag.removeprefix("--") in (*FIRST[command], "help") for flag in option["option_strings"])


def _rank(option: dict[str, Any], command: str) -> tuple[bool, int]:
    """Return the place of an option on the first page: as FIRST has it, and --help last."""
    flags = [flag.removeprefix("--") for flag in option["option_strings"]]
    order = FIRST.get(command, ())
    return "help" in flags, next((place for place, name in enumerate(order) if name in flags), len(order))


def _usage(described: dict[str, Any]) -> str:
    parser = argparse.ArgumentParser(prog=described["prog"], add_help=False)
    for option in described["options"]:
        if not option["option_strings"] or option.get("required"):
            parser._add_action(shown(option))
    words = parser.format_usage().removeprefix("usage: ").split()
    place = len(described["prog"].split())
    return " ".join([*words[:place], "[options]", *words[place:]]).replace("%", "%%")


def shown(option: dict[str, Any]) -> argparse.Action:
    """Return one described option as an action that is shown and never parsed."""
    # argparse compares SUPPRESS by identity.
    parts: dict[str, Any] = {
        name: argparse.SUPPRESS if option.get(name) == argparse.SUPPRESS else option.get(name) for name in _PARTS
    }
    return Shown(**{**parts, "option_strings": spelled_once(option["option_strings"])})


def spelled_once(flags: Sequence[str]) -> list[str]:
    """Return flags without those that only differ from another one in their dashes."""
    return [flag for flag in flags if f"--{flag[2:].replace('-', '_')}" not in flags or "-" not in flag[2:]]


class Shown(argparse.Action):
    """An option that is shown and never parsed."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise AssertionError: a help page parses nothing."""
        raise AssertionError("a help page parses nothing")


class _Formatter(argparse.HelpFormatter):
    """Shows defaults, except those that say nothing: unset, and off."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if not text or not action.option_strings or action.default in (None, False, "", argparse.SUPPRESS, "[]"):
            return text
        if "%(default)" in text or "(default" in text or action.default == []:
            return text
        return f"{text} (default: %(default)s)"


def _plain(value: Any) -> Any:
    """Return `value` in a form that JSON can hold and that argparse shows in the same words."""
    if isinstance(value, Iterable) and not isinstance(value, (str, type)):
        return [_plain(each) for each in value]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)
