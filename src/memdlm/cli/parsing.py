"""The parser whose flags are the fields of dataclasses."""

import argparse
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from memdlm.cli.parsers import OneLine, Parser
from memdlm.errors import ConfigError, did_you_mean
from memdlm.options import flag_class, from_flags, is_config

__all__ = ["DataclassParser", "Parser"]

TITLES = {
    "LoRAOptions": "adapter",
    "BiasOptions": "exposure-bias",
    "DecodingOptions": "model",
    "GenerationConfig": "decoding",
    "TrainingArguments": "training",
}
"""Titles of groups on help pages, where the class's own name would not do."""
SWITCH_VALUES = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}
"""What HfArgumentParser takes as the value of a switch, in any case."""


class DataclassParser(OneLine, HfArgumentParser):
    """Flags from dataclasses; values of a recipe file become the defaults that flags override."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any) -> None:
        self._configs = tuple(dataclass_types)
        types = [flag_class(each) if is_config(each) else each for each in self._configs]
        super().__init__(types, **kwargs)
        self._group_by_class()

    def _group_by_class(self) -> None:
        """Put the options of each class into a group of the help page, but not those of the command itself.

        Parsing does not change.
        """
        inherited = "transformers.TrainingArguments"
        for config in self._configs:
            title = TITLES.get(config.__name__) or re.sub(r"(Options|Config|Flags)$", "", config.__name__).lower()
            foreign = _foreign_fields(config)
            for field in dataclasses.fields(config):
                if title == self.prog.partition(" ")[2]:
                    break
                name = "memory" if field.name.startswith("mem_") else inherited if field.name in foreign else title
                group = _group_titled(self, name)
                for action in [each for each in self._optionals._group_actions if each.dest == field.name]:
                    self._optionals._group_actions.remove(action)
                    group._group_actions.append(action)
        # The longest group, and the one that is needed least, comes last.
        self._action_groups.sort(key=lambda group: group.title == inherited)

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


def _group_titled(parser: argparse.ArgumentParser, title: str) -> Any:
    return next((group for group in parser._action_groups if group.title == title), None) or (
        parser.add_argument_group(title)
    )


def _foreign_fields(config: type) -> set[str]:
    """Return the fields of `config` that transformers declares and that memdlm does not declare anew."""
    theirs = next((base for base in config.__mro__ if base.__module__.split(".")[0] == "transformers"), None)
    if theirs is None:
        return set()
    own = {
        name
        for base in config.__mro__
        if base.__module__.split(".")[0] == "memdlm"
        for name in vars(base).get("__annotations__", {})
    }
    return {field.name for field in dataclasses.fields(theirs)} - own
