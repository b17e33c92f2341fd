"""`memdlm info NAME`: what a model is and where its fast weights would sit, or what a memory holds."""

import dataclasses
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from memdlm.cli.memory import show_memories, show_memory
from memdlm.cli.output import say
from memdlm.cli.parsing import DataclassParser
from memdlm.memory.files.saved import holds_memories, inspect_memory, is_memory, list_memories
from memdlm.memory.flags import flags_of, memory_from_flags
from memdlm.terminal import json_text
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.summary import ModelSummary, summarise


def main(argv: Sequence[str]) -> int:
    """Print the summary of a model, a memory or a folder of memories, as tables or as JSON."""
    parser = DataclassParser(
        (flags_of("mem_inner_rank", "mem_inner_layer_fraction", "mem_inner_target_modules"),),
        prog="memdlm info",
        description="Describe a model, a memory or a folder of memories. No weights are loaded.",
    )
    parser.add_argument("model", help="folder or hub name of a model; folder of a memory or of several memories")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a hub repository")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    flags, options = parser.parse({}, argv)
    if is_memory(options.model) or holds_memories(options.model):
        found = [inspect_memory(options.model)] if is_memory(options.model) else list_memories(options.model)
        if options.json:
            say(json_text([dataclasses.asdict(each) for each in found], indent=2))
        elif is_memory(options.model):
            show_memory(found[0])
        else:
            show_memories(found)
        return 0
    config = memory_from_flags(vars(flags), {}, is_on=True)
    summary = summarise(options.model, config, revision=options.revision)
    if options.json:
        say(json_text(dataclasses.asdict(summary), indent=2))
    else:
        show(summary, options.model)
    return 0


def show(summary: ModelSummary, name: str) -> None:
    """Print the summary as two tables."""
    console = PlainConsole()
    facts = Table(title=name, title_justify="left", show_header=False)
    facts.add_row("family", f"{summary.family} ({summary.model_class})")
    facts.add_row("dtype", summary.dtype)
    blocks = summary.block_size
    facts.add_row("sees", "everything" if blocks is None else f"blocks of {blocks} tokens and those before")
    facts.add_row("predicts", "the next position" if summary.right_shift_logits else "its own position")
    for word, value in summary.sizes.items():
        facts.add_row(word, str(value))
    facts.add_row("parameters", _count(summary.num_parameters))
    facts.add_row("active per token", _count(summary.num_active_parameters))
    console.print(facts)
    table = Table(title=f"one memory, in some of the {summary.num_layers} blocks", title_justify="left", box=SIMPLE)
    for heading, justify in (
        ("projection", "left"),
        ("blocks", "left"),
        ("experts", "right"),
        ("in -> out", "right"),
        ("parameters", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=heading != "blocks")  # type: ignore[arg-type]
    for group in summary.sites:
        table.add_row(
            group.projection,
            ", ".join(map(str, group.layers)),
            "" if group.num_experts is None else str(group.num_experts),
            f"{group.in_features} -> {group.out_features}",
            f"{group.num_parameters:,}",
        )
    console.print(table)
    size = summary.num_fast_parameters * 4 / 2**20
    console.print(f"in all {_count(summary.num_fast_parameters)}, {size:.1f} MiB in float32")


def _count(number: int) -> str:
    for size, word in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number:,} ({number / size:.2f} {word})"
    return f"{number:,}"
