"""Write a document into a memory once, and save it if the gate, if any, lets it pass."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memdlm.data.documents import Document, plain_ids, read_document
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.masked_loss import loss_under, masked_text
from memdlm.memory import MemoryConfig, ParametricMemory, SavedMemory, compress
from memdlm.memory.files.saved import MEMORY
from memdlm.models.networks.sizes import trained_positions
from memdlm.options import option
from memdlm.outputs import Output, output_folder
from memdlm.randomness import derive
from memdlm.templates import message_ids
from memdlm.types import IGNORE_INDEX
from memdlm.version import __version__
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import ModelOptions, OwnWords, load_parts

GATES = ("none", "held_out", "written")
RATIO, ENOUGH, MOST_VIEWS = 0.2, 512, 5
"""Losses are measured with this share of tokens hidden, in views enough for this many predictions, at most five."""


@dataclass(frozen=True, kw_only=True)
class MemorizeOptions(ModelOptions):
    """What is written, and where it goes."""

    file: str | None = option(None, "The document: .txt, .md, .html or .pdf (with pypdf).")
    output: str | None = option(None, "Folder to write the memory to, such as doc.mem.")
    overwrite: bool = option(False, "Replace an earlier memory in output.")
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
    seed: int = option(0, "Seed of the write, and of the masks that losses are measured with.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("file", "output"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} is missing.")
        if self.gate != "held_out" and self.held_out_share != 0.1:
            raise ConfigError(f"held_out_share has no effect with gate={self.gate!r}; use gate=held_out.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Memorized:
    """The result of memorising a document."""

    kept: bool
    memory: SavedMemory
    """The memory; it is in the output folder if it was kept."""
    why: str
    """One sentence: what was measured, and the decision."""
    seconds: float
    """Duration of the write itself, without loading and measuring."""


def memorize(options: MemorizeOptions, config: MemoryConfig, display: Display) -> Memorized:
    """Read the document, write it, measure the memory, and save it unless the gate refuses.

    Raises DataError for a document that cannot be read, ConfigError when the output is taken.
    """
    with output_folder(str(options.output), MEMORY, overwrite=options.overwrite) as output:
        return _memorize(options, config, display, output)


def _memorize(options: MemorizeOptions, config: MemoryConfig, display: Display, output: Output) -> Memorized:
    document = read_document(str(options.file))
    model, tokenizer = load_parts(options, display)
    ids = document_ids(document, tokenizer, as_message=options.as_message)
    OwnWords(tokenizer, display.say).check([document.text], f"document {str(options.file)!r}")
    places = trained_positions(model)
    if config.chunk_length is None and places is not None and len(ids) > places:
        display.say(f"{len(ids)} tokens are written in chunks of {places}, the positions the model was trained on.")
        config = dataclasses.replace(config, chunk_length=places)
    memory = ParametricMemory(model, config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    done = Memorizer(memory, options, display).run(ids)
    noted = done.memory.noted(
        source=document.path,
        source_sha256=document.sha256,
        as_message=options.as_message,
        seed=options.seed,
        memdlm=__version__,
    )
    if done.kept:
        noted.save_to(output)
    return dataclasses.replace(done, memory=noted)


def document_ids(document: Document, tokenizer: PreTrainedTokenizerBase, *, as_message: bool) -> Tensor:
    """Return the ids [L] that are written; raises DataError when there are none, or there is no chat template."""
    if as_message:
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template; leave as_message out.")
        ids = message_ids(tokenizer, [{"role": "user", "content": document.text}])
    else:
        ids = plain_ids(tokenizer, document.text)
    if not ids:
        raise DataError(f"document: {document.path!r} has no tokens.")
    return torch.tensor(ids, dtype=torch.int64)


class Memorizer:
    """Writes one document, and measures before and after."""

    def __init__(self, memory: ParametricMemory, options: MemorizeOptions, display: Display) -> None:
        self.memory, self.options, self.display = memory, options, display

    def run(self, ids: Tensor) -> Memorized:
        """Write `ids` [L]; nothing is saved here."""
        gate: dict[str, Any] = {"name": self.options.gate}
        if self.options.gate == "held_out":
            gate |= self._held_out(ids)
        views = max(1, min(MOST_VIEWS, -(-ENOUGH // max(1, round(RATIO * len(ids))))))
        text = masked_text(ids, ratio=RATIO, views=views, generator=derive("memorize masks", self.options.seed))
        before = loss_under(self.memory, text)
        with self._written(ids, "writing") as seconds:
            written = loss_under(self.memory, text)
            saved = self.memory.export()
        measured: dict[str, Any] = {"loss_before": before, "loss_after": written, "num_scored": text.num_scored}
        if self.options.compress_rank is not None:
            saved = compress(saved, self.options.compress_rank)
            with self.memory.recall(saved):
                measured |= {"loss_after": loss_under(self.memory, text), "loss_before_compression": written}
        if self.options.gate == "written":
            gate |= {"before": before, "after": measured["loss_after"], "num_scored": text.num_scored}
        kept = self.options.gate == "none" or gate["after"] < gate["before"]
        saved = saved.noted(**measured, gate=gate)
        return Memorized(kept=kept, memory=saved, why=_reason(kept, gate), seconds=seconds)

    def _held_out(self, ids: Tensor) -> dict[str, Any]:
        """Write with some tokens always masked, and return the loss on them before and after."""
        generator = derive("memorize held out", self.options.seed)
        text = masked_text(ids, ratio=self.options.held_out_share, views=1, generator=generator)
        before = loss_under(self.memory, text)
        with self._written(ids.masked_fill(text.is_masked[0], self.memory.mask_token_id), "writing on trial"):
            after = loss_under(self.memory, text)
        return {"before": before, "after": after, "num_scored": text.num_scored}

    @contextmanager
    def _written(self, ids: Tensor, what: str) -> Iterator[float]:
        """Open a memory of `ids` [L]; yield the seconds that the write took. Mask tokens are not learned."""
        device = next(self.memory.model.parameters()).device
        batch = ids[None].to(device)
        labels = batch.masked_fill(batch == self.memory.mask_token_id, IGNORE_INDEX)
        generator = [derive("memorize", self.options.seed)]
        with ExitStack() as stack:
            start = time.perf_counter()
            with self.display.bar(what, what, len(ids)) as advance:
                stack.enter_context(self.memory.write(batch, labels, generator=generator, on_chunk=advance))
            yield time.perf_counter() - start


def _reason(kept: bool, gate: dict[str, Any]) -> str:
    if gate["name"] == "none":
        return "kept without a gate"
    where = "held-out tokens" if gate["name"] == "held_out" else "tokens of the document"
    change = f"the loss on {gate['num_scored']} masked {where} went from {gate['before']:.3f} to {gate['after']:.3f}"
    return f"{'kept' if kept else 'not kept'}: {change} nats per token"
