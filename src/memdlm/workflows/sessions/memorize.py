"""Write documents into memories, once, and save each memory that its gate, if any, lets pass."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from memdlm.errors import ConfigError, MemoryFileError
from memdlm.files import resolved
from memdlm.memory import MemoryConfig, ParametricMemory, SavedMemory
from memdlm.memory.files.saved import MEMORY
from memdlm.models.networks.sizes import trained_positions
from memdlm.options import option
from memdlm.outputs import Output, output_folder, refuse_foreign, refuse_place, shared_folder
from memdlm.version import __version__
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import ModelOptions, OwnWords, load_parts
from memdlm.workflows.sessions.documents import Target, earlier_memory, is_unchanged, targets_of
from memdlm.workflows.sessions.team import Team
from memdlm.workflows.sessions.writing import Gate, Memorizer, WrittenMemory

GATES = ("none", "held_out", "written")


@dataclass(frozen=True, kw_only=True)
class MemorizeOptions(ModelOptions):
    """What is written, and where it goes."""

    file: tuple[str, ...] | None = option(
        None,
        "Documents (.txt, .md, .html, or .pdf with pypdf), and folders, whose documents are all written. Each becomes "
        "a memory of its own.",
        repeated="extend",
    )
    output: str | None = option(
        None, "Folder to write the memory to, such as doc.mem. With several documents: the folder that holds them."
    )
    joined: bool = option(False, "Write all documents, in the order given, into one memory.")
    overwrite: bool = option(False, "Replace earlier memories whose document or options have changed.")
    as_message: bool = option(False, "Write the document as a user's message in the chat template, not as plain text.")
    gate: str = option(
        "none",
        "Keep the memory only if it lowers the loss. held_out: the loss on tokens that a trial write never "
        "saw; written: the loss on the written tokens, under new masks.",
        choices=GATES,
    )
    held_out_share: float = option(0.1, "With gate=held_out: share of the tokens that are held out.", above=0, below=1)
    compress_rank: int | None = option(
        None, "Keep the best approximation of the memory at this rank, and measure that.", minimum=1
    )
    batch_size: int = option(
        8,
        "Most documents written together. One that is longer than what is written at once is written alone.",
        minimum=1,
        maximum=2**10,
    )
    seed: int = option(0, "Seed of the write, and of the masks that losses are measured with.")

    def __post_init__(self) -> None:
        if isinstance(self.file, (str, list)):
            object.__setattr__(self, "file", (self.file,) if isinstance(self.file, str) else tuple(self.file))
        super().__post_init__()
        for name in ("file", "output"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing.")
        if self.gate != "held_out" and self.held_out_share != 0.1:
            raise ConfigError(f"held_out_share has no effect with gate={self.gate!r}; use gate=held_out.")

    @property
    def said(self) -> dict[str, Any]:
        """What decides about the result, besides documents, model and memory options; noted as `written_with`."""
        names = ("as_message", "seed", "gate", "held_out_share", "compress_rank")
        return {name: getattr(self, name) for name in names}

    @property
    def rule(self) -> Gate:
        """When a memory is kept."""
        return Gate(name=self.gate, held_out_share=self.held_out_share, compress_rank=self.compress_rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memorized:
    """What became of one memory that was to be written."""

    place: str
    """Its folder."""
    written: WrittenMemory | None
    """None: its documents and options are those of the memory that was there, and nothing was written."""
    together: int = 1
    """Number of documents that were written in the same batch."""

    @property
    def kept(self) -> bool:
        """Whether a memory of the documents is in its place."""
        return self.written is None or self.written.kept


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    target: Target
    ids: Tensor


def memorize(
    options: MemorizeOptions, config: MemoryConfig, display: Display, team: Team | None = None
) -> Iterator[Memorized]:
    """Read the documents, write what is new or changed, measure each memory, and save it unless the gate refuses.

    Yields what became of each memory as soon as it is decided: first those that are unchanged. The processes of a
    `team` share the writes, and each yields its own; the first also yields what is unchanged. Raises, before a model is
    loaded, DataError for a document that cannot be read, and ConfigError when an output is taken.
    """
    team = Team() if team is None else team
    held: list[Output] = []
    with ExitStack() as stack:

        def begin() -> tuple[list[Target], list[Target]]:
            targets, left_out = targets_of(options.file or (), str(options.output), joined=options.joined)
            if left_out:
                display.say(f"{len(left_out)} files are no documents and are left out: {_some(left_out)}")
            held.extend(_held(targets, options, stack))
            return targets, _unchanged(targets, options, config)

        def hold(target: Target) -> AbstractContextManager[Output]:
            return nullcontext(held[0]) if held else output_folder(target.place, MEMORY, overwrite=True)

        targets, unchanged = team.decided(begin)
        model, tokenizer = load_parts(options, display)

        def memory_of(config: MemoryConfig) -> ParametricMemory:
            return ParametricMemory(model, config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)

        memory = memory_of(config)
        same = team.decided(lambda: _still_unchanged(memory, unchanged, options))
        if team.is_first:
            yield from (Memorized(place=target.place, written=None) for target in same)
        ready = [
            _Ready(target, target.ids(tokenizer, as_message=options.as_message))
            for target in targets
            if target not in same
        ]
        words = OwnWords(tokenizer, display.say)
        for each in ready:
            words.check([each.target.text], f"document {each.target.documents[0].path!r}")
        places = trained_positions(model)
        most = min(options.batch_size, max(1, -(-len(ready) // team.size)))
        together, alone = _parted(ready, config, places, most)
        streamed = memory
        if alone and config.chunk_length is None:
            for each in alone:
                display.say(
                    f"{len(each.ids)} tokens are written in chunks of {places}, the positions the model was trained on."
                )
            streamed = memory_of(dataclasses.replace(config, chunk_length=places))
        batches = [*((memory, batch) for batch in together), *((streamed, [each]) for each in alone)]
        starts = accumulate((len(batch) for _, batch in batches), initial=0)
        for start, (writer, batch) in team.share(list(zip(starts, batches, strict=False))):
            yield from _written(writer, batch, (start, len(ready)), options, display, hold)


Hold = Callable[[Target], AbstractContextManager[Output]]


def _held(targets: Sequence[Target], options: MemorizeOptions, stack: ExitStack) -> list[Output]:
    """Take the outputs before the model is loaded; returns the output of a single target, which is held by itself.

    Of several, their folder is held, so that no number of documents needs as many locks.
    """
    if len(targets) == 1:
        return [stack.enter_context(output_folder(targets[0].place, MEMORY, overwrite=True))]
    stack.enter_context(shared_folder(str(options.output)))
    for target in targets:
        place = resolved(target.place)
        refuse_place(place, target.place, "output")
        refuse_foreign(place, MEMORY, shown=target.place)
    return []


def _unchanged(targets: Sequence[Target], options: MemorizeOptions, config: MemoryConfig) -> list[Target]:
    """Return the targets that look as if they were written already; ConfigError for others that are taken."""
    same, taken = [], []
    for target in targets:
        saved = earlier_memory(target)
        if saved is not None and is_unchanged(target, saved, config, options.said):
            same.append(target)
        elif any(Path(target.place).glob("*")):
            taken.append(target.place)
    if taken and not options.overwrite:
        raise ConfigError(
            f"output: {_some(taken)} holds a memory already, of another text or with other options; name a new folder, "
            "or add --overwrite."
        )
    return same


def _still_unchanged(memory: ParametricMemory, same: Sequence[Target], options: MemorizeOptions) -> list[Target]:
    """Return those of `same` that the loaded model can read; ConfigError for others that may not be replaced."""
    found = []
    for target in same:
        try:
            memory.load(target.place)
        except MemoryFileError as error:
            if not options.overwrite:
                raise ConfigError(f"output: it holds a memory already: {error} Add --overwrite.") from error
            continue
        found.append(target)
    return found


def _parted(
    ready: Sequence[_Ready], config: MemoryConfig, places: int | None, most: int
) -> tuple[list[list[_Ready]], list[_Ready]]:
    """Return batches of documents that are written in one piece, of like lengths, and those that are written alone."""
    limit = places if config.chunk_length is None else config.chunk_length
    if config.per_sample is False:
        most = 1  # all rows of a batch would share one memory
    alone = [each for each in ready if limit is not None and len(each.ids) > limit]
    fitting = sorted((each for each in ready if each not in alone), key=lambda each: len(each.ids))
    return [fitting[start : start + most] for start in range(0, len(fitting), most)], alone


def _written(
    memory: ParametricMemory,
    batch: Sequence[_Ready],
    count: tuple[int, int],
    options: MemorizeOptions,
    display: Display,
    hold: Hold,
) -> Iterator[Memorized]:
    """Write a batch and save what is kept; `count` is how many memories are done, and how many there are."""
    done, total = count
    what = "writing" if total == 1 else f"writing {done + 1} to {done + len(batch)} of {total}"
    found = Memorizer(memory, options.rule, options.seed, display).run([each.ids for each in batch], what)
    for each, written in zip(batch, found, strict=True):
        noted = noted_memory(written.memory, each.target, options)
        if written.kept:
            with hold(each.target) as output:
                noted.save_to(output)
        written = dataclasses.replace(written, memory=noted)
        yield Memorized(place=each.target.place, written=written, together=len(batch))


def noted_memory(saved: SavedMemory, target: Target, options: MemorizeOptions) -> SavedMemory:
    """Return the memory with its origin and the command's options in its provenance."""
    return saved.noted(
        **target.origin,
        as_message=options.as_message,
        seed=options.seed,
        memdlm=__version__,
        written_with=options.said,
    )


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
