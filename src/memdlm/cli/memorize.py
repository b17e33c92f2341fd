"""`memdlm memorize --model MODEL --file doc.txt --output doc.mem`: write a document once, keep it as a file."""

from collections.abc import Sequence

from memdlm.cli.decoding import MemoryFlags, learned_defaults
from memdlm.cli.output import say
from memdlm.cli.parsing import DataclassParser
from memdlm.memory.flags import memory_from_flags
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.memorize import Memorized, MemorizeOptions, memorize


def main(argv: Sequence[str]) -> int:
    """Write the memory and say what it does; returns 1 when the gate refused it."""
    parser = memorize_parser()
    options, flags = parser.parse(learned_defaults(argv), argv)
    memory = memory_from_flags(vars(flags), parser.given, is_on=True)
    assert memory is not None
    done = memorize(options, memory, Display())
    say(f"{options.output}: {described(done)}")
    say(done.why)
    return 0 if done.kept else 1


def memorize_parser() -> DataclassParser:
    """Return the command's parser."""
    return DataclassParser(
        (MemorizeOptions, MemoryFlags),
        prog="memdlm memorize",
        description="Write a document into a memory and save it. The mem_* options default to those that the model's "
        "own memory was trained with, if it has one.",
    )


def described(done: Memorized) -> str:
    """Say in one line what was written and what it changed."""
    facts = done.memory.provenance
    line = (
        f"{facts['tokens']} tokens written in {done.seconds:.2f} s, rank {done.memory.rank}, "
        f"{done.memory.num_parameters:,} numbers; loss on {facts['num_scored']} masked tokens "
        f"{facts['loss_before']:.3f} -> {facts['loss_after']:.3f} nats per token"
    )
    if "compression" in facts:
        line += (
            f" ({facts['loss_before_compression']:.3f} before compression, which lost "
            f"{facts['compression']['relative_error']:.1%} of the norm)"
        )
    return line
