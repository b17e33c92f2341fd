"""`memdlm memory ACTION ...`: list, show, rename, combine, compress, export and delete saved memories."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from memdlm.cli.output import note, say
from memdlm.cli.parsing import DataclassParser, Parser
from memdlm.errors import ConfigError, unknown
from memdlm.evaluation.masked_loss import Interference
from memdlm.memory import MemorySummary, compress, delete_memory, inspect_memory, read_memory, rename_memory
from memdlm.memory.files.library import find_memory, list_below
from memdlm.memory.files.saved import MEMORY
from memdlm.outputs import output_folder
from memdlm.terminal import json_text
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.combine import Combined, CombineOptions, combine
from memdlm.workflows.sessions.merging import ExportOptions, export_memory

MOST_WIDTH = 10**4


def main(argv: Sequence[str]) -> int:
    """Run one action; without one, list the memories here."""
    words = list(argv) or ["list"]
    if words[0] in ("-h", "--help"):
        _parser().parse_args(words)
    if words[0] not in ACTIONS:
        raise ConfigError(f"{unknown('memory:', words[0], ACTIONS)} memdlm memory --help describes them.")
    ACTIONS[words[0]][0](words[1:])
    return 0


def _parser() -> Parser:
    """Return the parser whose help page describes the actions; each action has one of its own."""
    width = max(map(len, ACTIONS))
    told = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in ACTIONS.items())
    parser = Parser(
        prog="memdlm memory",
        usage="memdlm memory [ACTION] [...]",
        description="Look after saved memories. Without an action, list those in this folder.",
        epilog=f"actions:\n{told}\n\nmemdlm memory ACTION --help lists an action's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", metavar="ACTION", nargs="?", help=f"one of {', '.join(ACTIONS)}")
    return parser


def _action(name: str, description: str) -> Parser:
    return Parser(prog=f"memdlm memory {name}", description=description)


def _list(argv: list[str]) -> None:
    parser = _action("list", "List the memories in a folder and in the folders directly in it.")
    parser.add_argument("folder", nargs="?", default=".", help="folder of memories (default: this one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    found = list_below(options.folder)
    if options.json:
        say(json_text([dataclasses.asdict(each) for each in found], indent=2))
    elif found:
        show_memories(found)
    else:
        say(f"no memories in {options.folder}. memdlm memorize --model MODEL --file FILE --output NAME.mem writes one.")


def _show(argv: list[str]) -> None:
    parser = _action("show", "Describe memories: what each holds and where it comes from.")
    parser.add_argument("memory", nargs="+", help="folders of memories")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    found = [inspect_memory(find_memory(each)) for each in options.memory]
    if options.json:
        say(json_text([dataclasses.asdict(each) for each in found], indent=2))
        return
    for each in found:
        show_memory(each)


def _rm(argv: list[str]) -> None:
    parser = _action("rm", "Delete memories. A folder that holds anything else is left as it is.")
    parser.add_argument("memory", nargs="+", help="folders of memories")
    options = parser.parse_args(argv)
    # All are found before the first is deleted.
    for each in dict.fromkeys([find_memory(each) for each in options.memory]):
        delete_memory(each)
        say(f"{each}: deleted")


def _rename(argv: list[str]) -> None:
    parser = _action("rename", "Give a memory another name or place.")
    parser.add_argument("old", help="folder of the memory")
    parser.add_argument("new", help="folder that it is to be; it must not exist")
    options = parser.parse_args(argv)
    rename_memory(options.old, options.new)
    say(f"{options.old}: now {options.new}")


def _compress(argv: list[str]) -> None:
    parser = _action("compress", "Write the closest memory of a lower rank (truncated singular value decomposition).")
    parser.add_argument("memory", help="folder of the memory")
    parser.add_argument("--rank", type=int, required=True, help="rank of the new memory, below that of the old one")
    parser.add_argument("--output", required=True, help="folder to write the compressed memory to")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier memory in output")
    options = parser.parse_args(argv)
    with output_folder(options.output, MEMORY, overwrite=options.overwrite) as output:
        before = read_memory(find_memory(options.memory))
        small = compress(before, options.rank)
        small.save_to(output)
    lost = small.provenance["compression"]
    say(
        f"{options.output}: rank {before.rank} -> {small.rank}, {before.num_parameters:,} -> "
        f"{small.num_parameters:,} numbers; it lost {lost['relative_error']:.1%} of the norm "
        f"({lost['worst_module']:.1%} in the worst projection)"
    )


def _combine(argv: list[str]) -> None:
    parser = combine_parser()
    options, given = parser.parse({}, argv)
    found = combine(given.memory, options, Display())
    say(f"{options.output}: rank {found.memory.rank}, {found.memory.num_parameters:,} numbers")
    if found.interference:
        show_interference(found.interference)
    for path, reason in found.not_measured.items():
        note(f"warning: {path}: what it loses was not measured: {reason}")
    for warning in warnings_of(found):
        note(f"warning: {warning}")


def _export(argv: list[str]) -> None:
    parser = DataclassParser(
        (ExportOptions,),
        prog="memdlm memory export",
        description="Write a memory for other programs: an adapter that plain PEFT loads on the published network (one "
        "linear layer per expert), or with --merged a whole model with the memory in its weights.",
    )
    parser.add_argument("memory", help="folder of the memory")
    options, given = parser.parse({}, argv)
    saved = export_memory(given.memory, options, Display())
    if options.merged:
        say(f"{options.output}: a model with {given.memory} in its weights")
    else:
        say(f"{options.output}: a LoRA of rank {saved.rank} on {len(saved.pairs)} linear layers, for PEFT")


def combine_parser() -> DataclassParser:
    """Return the parser of `memdlm memory combine`."""
    parser = DataclassParser(
        (CombineOptions,),
        prog="memdlm memory combine",
        description="Put memories of one model together. The sum of what they add is exact; what this does to the loss "
        "on their texts is measured and shown. Unless --model names it, the model is the one that the memories were "
        "written for.",
    )
    parser.add_argument("memory", nargs="+", help="folders of memories, or of several memories")
    return parser


def warnings_of(found: Combined) -> list[str]:
    """Say which texts lose by the combination, and which keep nothing."""
    warnings = []
    for each in found.interference:
        if each.cost <= 0:
            continue
        kept = ""
        if each.combined >= each.without:
            kept = f" It is no better than without a memory ({each.without:.3f})."
        warnings.append(
            f"{each.name}: the loss on its text is {each.cost:.3f} nats per masked token higher in the combination "
            f"({each.own:.3f} -> {each.combined:.3f}).{kept}"
        )
    return warnings


def show_interference(found: Sequence[Interference]) -> None:
    """Print the loss on each text without a memory, with its own, and with the combination."""
    table = Table(title="loss on the texts, in nats per masked token", title_justify="left", box=SIMPLE)
    table.add_column("memory", no_wrap=True)
    for heading in ("without", "own", "combined"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        table.add_row(each.name, f"{each.without:.3f}", f"{each.own:.3f}", f"{each.combined:.3f}")
    _console().print(table)


def show_memories(found: Sequence[MemorySummary]) -> None:
    """Print one table with a row per memory."""
    table = Table(box=SIMPLE)
    for heading, justify in (
        *(("memory", "left"), ("written from", "left"), ("tokens", "right"), ("rank", "right"), ("MiB", "right")),
        *(("loss", "right"), ("for", "left")),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for each in found:
        if each.problem is not None:
            table.add_row(each.path, "unreadable: memdlm memory show says why", "", "", "", "", "")
            continue
        facts = each.provenance
        loss = f"{facts['loss_before']:.2f} -> {facts['loss_after']:.2f}" if _has_losses(facts) else ""
        table.add_row(
            *(each.path, _origin(facts), str(facts.get("tokens", "")), str(each.rank)),
            *(f"{each.num_bytes / 2**20:.2f}", loss, Path(each.model).name or each.family),
        )
    _console().print(table)


def _console() -> PlainConsole:
    console = PlainConsole()
    if not console.is_terminal:
        # In a file or a pipe nothing is cut off.
        console.width = MOST_WIDTH
    return console


def _has_losses(facts: dict[str, Any]) -> bool:
    return all(isinstance(facts.get(name), (int, float)) for name in ("loss_before", "loss_after"))


def _origin(facts: dict[str, Any]) -> str:
    for name, words in (("combined", "memories"), ("sources", "documents")):
        if name in facts:
            return f"{len(facts[name])} {words}"
    return Path(facts.get("source", "")).name


def show_memory(memory: MemorySummary) -> None:
    """Print what one memory holds and where it comes from, or why it cannot be read."""
    console = _console()
    facts = Table(title=memory.path, title_justify="left", show_header=False)
    if memory.problem is not None:
        facts.add_row("unreadable", memory.problem)
        console.print(facts)
        return
    left_out = f"; {memory.num_left_out} experts that add nothing are left out" if memory.num_left_out else ""
    checked = ["base weights", *(["tokenizer"] if memory.has_tokenizer else [])]
    facts.add_row("written for", f"{memory.model} ({memory.family})")
    facts.add_row("checked", ", ".join([*checked, *(["learned start"] if memory.has_learned_start else [])]))
    facts.add_row("rank", str(memory.rank))
    facts.add_row("modules", f"{memory.num_modules} in {memory.num_layers} projections{left_out}")
    facts.add_row("size", f"{memory.num_parameters:,} numbers, {memory.num_bytes / 2**20:.2f} MiB")
    for name, value in memory.provenance.items():
        facts.add_row(name, _told(value))
    console.print(facts)


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


ACTIONS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "list": (_list, "list the memories in a folder"),
    "show": (_show, "describe memories: what each holds and where it comes from"),
    "rename": (_rename, "give a memory another name or place"),
    "combine": (_combine, "put memories together, and measure what each loses"),
    "compress": (_compress, "write a smaller memory of a lower rank"),
    "export": (_export, "write a memory for plain PEFT, or a model that holds it"),
    "rm": (_rm, "delete memories"),
}
"""What can be done; each takes the words behind its name."""
