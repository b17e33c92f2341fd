"""Recipes: flat YAML files of options. A value that is not of its option's type raises an error that names it."""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from memdlm.cli import names
from memdlm.errors import ConfigError, did_you_mean, unknown
from memdlm.options import members_of

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""How a switch may be written in quotes."""


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the later value would silently replace the earlier one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


@dataclasses.dataclass(frozen=True, slots=True)
class _Option:
    """What a recipe may set one option to."""

    types: frozenset[Any]
    """Members of the option's type hint: types, and lists or tuples of a type."""
    choices: tuple[str, ...]
    is_optional: bool
    """Whether the value may be empty: the option is unset by default."""


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a flat YAML mapping; raises ConfigError when there is no such file or it holds something else."""
    if not path.is_file():
        raise ConfigError(f"recipe: {str(path)!r} is no file. memdlm recipes lists those that can be called by name.")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OSError) as error:
        raise ConfigError(f"recipe: {path} is not valid YAML: {error or type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"recipe: {path} holds no options; it must be a mapping, one `option: value` per line.")
    for key in found:
        if not isinstance(key, str):
            raise ConfigError(f"recipe: {path}: {key!r} is no option; option names are text.")
    return found


def typed_recipe(recipe: Mapping[str, Any], path: Path, configs: Iterable[type]) -> dict[str, Any]:
    """Return `recipe` with every value converted to the type of its option, a field of one of `configs`.

    YAML reads `no` as false and `1e-4` as text; such values are converted where only one meaning is possible. Raises
    ConfigError for an unknown option, and for a value that its option does not take; the message names file, option
    and value.
    """
    options = {name: option for config in configs for name, option in _options(config)}
    typed = {}
    try:
        recipe = names.translated_keys(recipe, options)
    except ConfigError as error:
        raise ConfigError(f"recipe: {path}: {error}") from error
    for name, value in recipe.items():
        if name not in options:
            hint = names.instead(name) or did_you_mean(name, options)
            raise ConfigError(f"recipe: {path}: option {name!r} is not known.{hint}")
        try:
            typed[name] = _typed(value, options[name])
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"recipe: {path}: {name}: {error}") from error
    return typed


def _options(config: type) -> Iterable[tuple[str, _Option]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.init:
            members = members_of(hints[field.name])
            choices = field.metadata.get("limits", {}).get("choices") or ()
            for member in members:
                if isinstance(member, type) and issubclass(member, Enum):
                    choices = [str(each.value) for each in member]
            types = {str if isinstance(each, type) and issubclass(each, Enum) else each for each in members}
            yield field.name, _Option(frozenset(types), tuple(choices), field.default is None)


def _typed(value: Any, option: _Option) -> Any:
    """Return `value` in the option's type; raises ValueError when the option does not take it."""
    if value is None:
        if option.is_optional:
            return None
        raise ValueError(f"it has no value. It takes {_words(option)}; leave the line out for the default.")
    items = [typing.get_args(each)[0] for each in option.types if typing.get_origin(each) in (list, tuple)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and items:
        return [_single(each, _Option(frozenset(items), option.choices, False)) for each in value]
    kinds = {typing.get_origin(each) or each for each in option.types}
    if isinstance(value, dict) and dict in kinds:
        return value
    if items and not kinds & {str, int, float, bool}:
        return [_single(value, _Option(frozenset(items), option.choices, False))]
    return _single(value, option)


def _single(value: Any, option: _Option) -> Any:
    types = option.types
    if isinstance(value, bool):
        if bool in types:
            return value
        if not value and "no" in option.choices:
            return "no"
    elif isinstance(value, (int, float)) and types & {int, float}:
        return _number(value, value, option)
    elif isinstance(value, str):
        return _from_text(value, option)
    hint = " YAML does not read it as text: put it in quotes." if str in types else ""
    raise ValueError(f"{_shown(value)} is not possible. It takes {_words(option)}.{hint}")


def _number(value: int | float, written: Any, option: _Option) -> int | float:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{written!r} is not finite. It takes {_words(option)}.")
    if float in option.types:
        return float(value)
    if isinstance(value, float):
        raise ValueError(f"{written!r} is not possible. It takes {_words(option)}.")
    return value


def _from_text(value: str, option: _Option) -> Any:
    types = option.types
    if str in types or not types & {int, float, bool}:
        if option.choices and value not in option.choices:
            raise ValueError(unknown("value", value, option.choices))
        return value
    if bool in types and value.lower() in SWITCHES:
        return SWITCHES[value.lower()]
    for kind in (int, float):
        if kind in types:
            try:
                return _number(kind(value), value, option)
            except ValueError as error:
                if kind is float or float not in types:
                    raise ValueError(f"{value!r} is not possible. It takes {_words(option)}.") from error
    raise ValueError(f"{value!r} is not possible. It takes {_words(option)}.")


def _words(option: _Option) -> str:
    if option.choices:
        return f"one of {', '.join(option.choices)}"
    kinds = [typing.get_origin(each) or each for each in option.types]
    words = [word for kind, word in WORDS.items() if kind in kinds or (kind is list and tuple in kinds)]
    return " or ".join(words) or "nothing that a recipe can hold"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 1000 else "so large a number"
    return text if len(text) <= 80 else f"{text[:77]}..."
