"""Hooks of the documentation site: tables made from the code, and links to files of the repository.

Option tables and the import table are read from the package when the site is built, so they cannot fall behind it.
A page asks for one with a comment: `<!-- options: memory -->`, `<!-- command: generate -->`, `<!-- imports -->`.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
sys.path.insert(0, str(SOURCE))

REPOSITORY = "https://github.com/memdlm/memdlm/blob/main"
WHOLE_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
"""Files at the root of the repository, and the page that shows each; the first two become pages as they are."""
COPIED = (".json",)
"""Linked files that the site carries itself, so that figures can be checked where they are read."""
CONFIGS = {
    "memory": ("memdlm.memory.config", "MemoryConfig", "mem_"),
    "decoding": ("memdlm.inference.config", "GenerationConfig", ""),
    "diffusion": ("memdlm.training.arguments", "DiffusionConfig", ""),
}
"""Option classes by the name that a page asks for: module, class, prefix of the flags."""
LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]+)(\)|#[^)]*\))")
MARKER = re.compile(r"<!-- (\w+)(?:: ([\w-]+))? -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository, and the figures that pages link to."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, WHOLE_PAGES[name], abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "benchmarks").rglob("*.json")):
        place = f"repository/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in tables, and turn links that leave the documentation folder into ones that work on the site."""
    markdown = MARKER.sub(lambda match: _table(match[1], match[2]), markdown)
    folder = (ROOT / "docs" / page.file.src_uri).parent
    depth = page.file.src_uri.count("/")

    def relink(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return match[0]
        if not path.is_relative_to(ROOT) or not path.exists():
            raise PluginError(f"{page.file.src_uri} links to {match[2]}, which does not exist.")
        name = path.relative_to(ROOT).as_posix()
        if name in WHOLE_PAGES:
            return f"{match[1]}{'../' * depth}{WHOLE_PAGES[name]}{match[3]}"
        if path.suffix in COPIED and name.startswith("benchmarks/"):
            return f"{match[1]}{'../' * depth}repository/{name}{match[3]}"
        return f"{match[1]}{REPOSITORY}/{name}{match[3]}"

    return LINK.sub(relink, markdown)


def _table(kind: str, what: str | None) -> str:
    makers: Mapping[str, Callable[[str], str]] = {"options": config_table, "command": command_tables}
    if kind == "imports":
        return import_table()
    if kind == "commands":
        return commands_table()
    if kind not in makers or what is None:
        raise PluginError(f"a page asks for {kind}: {what}, which no hook makes.")
    return makers[kind](what)


def config_table(what: str) -> str:
    """Return the table of an option class: name, default, help and what is possible."""
    module, name, prefix = CONFIGS[what]
    config = getattr(importlib.import_module(module), name)
    hints = get_type_hints(config)
    rows = [
        (
            f"`{prefix}{field.name}`",
            _value(field.default),
            _meaning(field.metadata["help"], _possible(hints[field.name], field.metadata["limits"])),
        )
        for field in dataclasses.fields(config)
    ]
    return _markdown(("option", "default", "meaning"), rows)


def command_tables(name: str) -> str:
    """Return the options of one command as its parser has them, without those of the tables above it."""
    parser = parser_of(name)
    shared = _shared_flags(name)
    rows = []
    for action in parser._actions:
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        if {"--help", "--help-all"} & set(flags) or any(flag[2:] in shared for flag in flags):
            continue
        word = f"`{flags[0]}`" if flags else f"`{action.dest.upper()}`"
        help_text = re.sub(r" One of: [^.]+\.$", "", _help(action))
        rows.append((word, _default(action), _meaning(help_text, _kinds(action, _help(action)))))
    return _markdown(("option", "default", "meaning"), rows)


def commands_table() -> str:
    """Return the table of all commands."""
    commands = importlib.import_module("memdlm.cli.main").COMMANDS
    return _markdown(("command", "what it does"), [(f"`memdlm {name}`", text) for name, text in commands.items()])


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command: the one that answers its own --help."""
    found: list[argparse.ArgumentParser] = []
    main = importlib.import_module(f"memdlm.cli.{name.replace('-', '_')}").main
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda self, file=None: found.append(self)),
        contextlib.suppress(SystemExit),
    ):
        main(["--help"])
    if not found:
        raise PluginError(f"memdlm {name} --help showed no help.")
    return found[0]


def _shared_flags(command: str) -> set[str]:
    """Names that have a table of their own on the page, and the ones of transformers that we leave as they are."""
    names = {
        prefix + field.name
        for module, config, prefix in CONFIGS.values()
        for field in dataclasses.fields(getattr(importlib.import_module(module), config))
    }
    if command == "train":
        ours = importlib.import_module("memdlm.training.arguments").TrainingArguments
        theirs = importlib.import_module("transformers").TrainingArguments
        names |= {field.name for field in dataclasses.fields(theirs)} - set(vars(ours)["__annotations__"])
        names -= {"output_dir", "max_length"}
    return names


def import_table() -> str:
    """Return who may import whom, from the test that enforces it."""
    tree = ast.parse((ROOT / "tests" / "test_house.py").read_text())
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("FOUNDATION", "MAY_IMPORT", "ROOMS"):
                values[name] = eval(compile(ast.Expression(node.value), name, "eval"), {"set": set})
    foundation = ", ".join(f"`{name}`" for name in sorted(values["FOUNDATION"]))
    rooms = {name: allowed for name, allowed in values["ROOMS"].items() if "/" in name}
    return (
        _markdown(("package", "what it is", "may import"), _import_rows(values["MAY_IMPORT"]))
        + f"\nAll may import the foundation: {foundation}.\n\nThe rooms of the larger packages:\n\n"
        + _markdown(("room", "what it is", "may import, of its package"), _import_rows(rooms))
    )


def _import_rows(table: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    rows = []
    for name, allowed in table.items():
        docstring = ast.get_docstring(ast.parse((SOURCE / "memdlm" / name / "__init__.py").read_text())) or ""
        shown = ", ".join(f"`{each}`" for each in sorted(allowed)) or "nothing"
        rows.append((f"`{name}`", docstring.splitlines()[0], shown))
    return rows


def _markdown(head: Collection[str], rows: list[tuple[str, ...]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f'<div class="options" markdown>\n\n{table}\n\n</div>\n'


def _meaning(help_text: str, possible: str) -> str:
    return f"{help_text}<br><small>{possible}</small>"


def _value(value: Any) -> str:
    if value is dataclasses.MISSING or value is argparse.SUPPRESS:
        return ""
    if value is None or value == ():
        return "unset"
    return f"`{value}`"


def _possible(hint: Any, limits: Mapping[str, Any]) -> str:
    if limits["choices"] is not None:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = {bool: "True, False", int: "integer", float: "number", str: "text"}
    named = [words.get(kind, "integers") for kind in kinds if kind is not type(None)]
    return " ".join([" or ".join(named), *_bounds(limits)])


def _bounds(limits: Mapping[str, Any]) -> Iterator[str]:
    for name, sign in (("above", ">"), ("minimum", ">="), ("maximum", "<="), ("below", "<")):
        if limits[name] is not None:
            yield f"{sign} {limits[name]}"


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%").strip()


def _default(action: argparse.Action) -> str:
    if action.required or not action.option_strings:
        return "required"
    if action.nargs == 0:
        return "off"
    return _value(action.default)


def _kinds(action: argparse.Action, help_text: str) -> str:
    listed = re.search(r" One of: ([^.]+)\.$", help_text)
    if listed or action.choices:
        choices = listed[1].split(", ") if listed else list(action.choices or ())
        return ", ".join(f"`{choice}`" for choice in choices)
    if action.nargs == 0:
        return "flag"
    word = {int: "integer", float: "number", str: "text", None: "text"}.get(action.type)  # type: ignore[call-overload]
    several = " ..." if action.nargs in ("+", "*") else ""
    return (word or "True, False") + several
