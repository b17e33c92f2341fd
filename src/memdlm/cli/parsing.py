"""Parsers that report mistakes as ConfigError: one line that names the flag, the value and the way out."""

import argparse
import itertools
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from memdlm.errors import ConfigError, did_you_mean
from memdlm.options import flag_class, from_flags, is_config

SWITCH_VALUES = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}
"""What HfArgumentParser takes as the value of a switch, in any case."""


class _OneLine(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: dict[str, Any] = {}
        """By name, the values that flags gave in the last parse; defaults are not included."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as usual, and note the given flags in `given`."""
        self.given = {}
        return super().parse_known_args(args, namespace)

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
            message = f"option {match[1]!r} is not known.{did_you_mean(match[1].split('=')[0], flags)}"
        end = "" if message.endswith("?") else "."
        raise ConfigError(f"{message.rstrip('.')}{end} {self.prog} --help lists the options.")


def is_collecting(action: argparse.Action) -> bool:
    """Whether a flag may be repeated because its values are collected."""
    return not isinstance(action, (argparse._StoreAction, argparse._StoreConstAction))


class Parser(_OneLine):
    """A plain argument parser."""


class DataclassParser(_OneLine, HfArgumentParser):
    """Flags from dataclasses; values of a recipe file become the defaults that flags override."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        self._configs = tuple(dataclass_types)
        types = [flag_class(each) if is_config(each) else each for each in self._configs]
        super().__init__(types, **kwargs)

    def parse(self, recipe: dict[str, Any], argv: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance per dataclass; if arguments were added by hand, a namespace of those comes last.

        Raises ConfigError for an unknown key of `recipe`; the message names the nearest known one.
        """
        known = [action.dest for action in self._actions]
        for key in recipe:
            if key not in known:
                raise ConfigError(f"recipe: option {key!r} is not known.{did_you_mean(key, known)}")
        self.set_defaults(**{key: self._typed(key, value) for key, value in recipe.items()})
        for action in self._actions:
            if action.dest in recipe:
                action.required = False
        argv = self._spelled_out(argv)
        _, unrecognised = self.parse_known_args(list(argv))
        if unrecognised:
            self.error(f"unrecognized arguments: {' '.join(unrecognised)}")
        # By default transformers also reads an arguments file beside the program.
        parsed = self.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
        count = len(self._configs)
        built = tuple(
            from_flags(config, each) if is_config(config) else each
            for config, each in zip(self._configs, parsed[:count], strict=True)
        )
        return (*built, *parsed[count:])

    def _spelled_out(self, argv: Sequence[str]) -> list[str]:
        """Put True after a switch without a value, so that the next argument is not taken for its value."""
        switches = {
            flag
            for action in self._actions
            if action.nargs == "?" and action.const is True
            for flag in action.option_strings
        }
        words = []
        for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
            words.append(word)
            if word in switches and following.lower() not in SWITCH_VALUES:
                words.append("True")
        return words

    def _typed(self, key: str, value: Any) -> Any:
        """Convert a YAML value to the flag's type (YAML reads 1e-4 as a string)."""
        action = next(action for action in self._actions if action.dest == key)
        if isinstance(value, str) and callable(action.type):
            try:
                return action.type(value)
            except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
                raise ConfigError(f"recipe: {key}: {value!r} is not valid: {error}") from error
        return value
