"""`memdlm memorize --model MODEL --file doc.txt --output doc.mem`: write documents once, keep them as memories.

Several processes (`accelerate launch`, `torchrun`) share the documents.
"""

from collections import Counter
from collections.abc import Sequence

from memdlm.cli.decoding import MemoryFlags, learned_defaults
from memdlm.cli.output import note, say
from memdlm.cli.parsing import DataclassParser
from memdlm.memory.flags import memory_from_flags
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.memorize import Memorized, MemorizeOptions, memorize
from memdlm.workflows.sessions.team import Team


def main(argv: Sequence[str]) -> int:
    """Write the memories and say what each does; returns 1 when the gate refused one."""
    parser = memorize_parser()
    options, flags = parser.parse(learned_defaults(argv), argv)
    memory = memory_from_flags(vars(flags), parser.given, is_on=True)
    assert memory is not None
    team = Team.launched()
    own: Counter[str] = Counter()
    for done in memorize(options, memory, Display() if team.is_first else Display.silent(), team):
        own["unchanged" if done.written is None else "written" if done.kept else "not kept"] += 1
        say(f"{done.place}: {described(done)}", flush=True)
        if done.written is not None:
            say(done.written.why, flush=True)
    # All processes end alike, when the last one is done: a launcher that sees one fail stops the others.
    count = sum(team.gathered(own), Counter())
    if count.total() > 1 and team.is_first:
        note(", ".join(f"{number} {what}" for what, number in count.items()))
    return 1 if count["not kept"] else 0


def memorize_parser() -> DataclassParser:
    """Return the command's parser."""
    return DataclassParser(
        (MemorizeOptions, MemoryFlags),
        prog="memdlm memorize",
        description="Write documents into memories and save them. A memory whose documents and options are unchanged "
        "is not written again. The mem_* options default to those that the model's own memory was trained with, if it "
        "has one.",
    )


def described(done: Memorized) -> str:
    """Say in one line what was written and what it changed."""
    if done.written is None:
        return "unchanged, not written again"
    memory, facts = done.written.memory, done.written.memory.provenance
    others = f" together with {done.together - 1} more" if done.together > 1 else ""
    line = (
        f"{facts['tokens']} tokens written in {done.written.seconds:.2f} s{others}, rank {memory.rank}, "
        f"{memory.num_parameters:,} numbers; loss on {facts['num_scored']} masked tokens "
        f"{facts['loss_before']:.3f} -> {facts['loss_after']:.3f} nats per token"
    )
    if "compression" in facts:
        line += (
            f" ({facts['loss_before_compression']:.3f} before compression, which lost "
            f"{facts['compression']['relative_error']:.1%} of the norm)"
        )
    return line
