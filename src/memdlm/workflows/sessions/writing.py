"""Write documents into memories, several at a time, and measure each memory before and after."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdlm.evaluation.masked_loss import MaskedText, loss_under, masked_text
from memdlm.memory import ParametricMemory, SavedMemory, compress
from memdlm.padding import right_padded
from memdlm.randomness import derive
from memdlm.types import IGNORE_INDEX
from memdlm.workflows.display import Display

RATIO, ENOUGH, MOST_VIEWS = 0.2, 512, 5
"""Losses are measured with this share of tokens hidden, in views enough for this many predictions, at most five."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """When a memory is kept, and what is left of it."""

    name: str = "none"
    held_out_share: float = 0.1
    compress_rank: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenMemory:
    """One document's memory, measured; nothing is saved."""

    kept: bool
    memory: SavedMemory
    why: str
    """One sentence: what was measured, and the decision."""
    seconds: float
    """Duration of the write, which all documents of the batch shared."""


class Memorizer:
    """Writes documents, each into a memory of its own, and measures before and after."""

    def __init__(self, memory: ParametricMemory, gate: Gate, seed: int, display: Display) -> None:
        self.memory, self.gate, self.seed, self.display = memory, gate, seed, display

    def run(self, texts: Sequence[Tensor], what: str = "writing") -> list[WrittenMemory]:
        """Write `texts` ([L] each) as the rows of one batch; every row becomes what it would become alone."""
        gates: list[dict[str, Any]] = [{"name": self.gate.name} for _ in texts]
        if self.gate.name == "held_out":
            gates = [gate | more for gate, more in zip(gates, self._held_out(texts, what), strict=True)]
        hidden = [self._hidden(ids) for ids in texts]
        before = [loss_under(self.memory, text) for text in hidden]
        with self._written(texts, what) as seconds:
            losses = list(self._losses(hidden))
            exported = [self.memory.export(row) for row in range(len(texts))]
        found = []
        for saved, text, first, last, gate in zip(exported, hidden, before, losses, gates, strict=True):
            measured: dict[str, Any] = {"loss_before": first, "loss_after": last, "num_scored": text.num_scored}
            if self.gate.compress_rank is not None:
                saved = compress(saved, self.gate.compress_rank)
                with self.memory.recall(saved):
                    measured |= {"loss_after": loss_under(self.memory, text), "loss_before_compression": last}
            if self.gate.name == "written":
                gate |= {"before": first, "after": measured["loss_after"], "num_scored": text.num_scored}
            kept = self.gate.name == "none" or gate["after"] < gate["before"]
            noted = saved.noted(**measured, gate=gate)
            found.append(WrittenMemory(kept=kept, memory=noted, why=_reason(kept, gate), seconds=seconds))
        return found

    def _hidden(self, ids: Tensor) -> MaskedText:
        views = max(1, min(MOST_VIEWS, -(-ENOUGH // max(1, round(RATIO * len(ids))))))
        return masked_text(ids, ratio=RATIO, views=views, generator=derive("memorize masks", self.seed))

    def _losses(self, texts: Sequence[MaskedText]) -> Iterator[float]:
        """Inside a written batch: yield the loss of each text under its own memory."""
        for row, text in enumerate(texts):
            with self.memory.of_rows(torch.tensor([row])):
                yield loss_under(self.memory, text)

    def _held_out(self, texts: Sequence[Tensor], what: str) -> list[dict[str, Any]]:
        """Write with some tokens always masked, and return the loss on them before and after."""
        share = self.gate.held_out_share
        hidden = [
            masked_text(ids, ratio=share, views=1, generator=derive("memorize held out", self.seed)) for ids in texts
        ]
        before = [loss_under(self.memory, text) for text in hidden]
        mask = self.memory.mask_token_id
        shown = [ids.masked_fill(text.is_masked[0], mask) for ids, text in zip(texts, hidden, strict=True)]
        with self._written(shown, f"{what} on trial"):
            after = list(self._losses(hidden))
        return [
            {"before": first, "after": last, "num_scored": text.num_scored}
            for first, last, text in zip(before, after, hidden, strict=True)
        ]

    @contextmanager
    def _written(self, texts: Sequence[Tensor], what: str) -> Iterator[float]:
        """Open memories of `texts`; yield the seconds that the write took. Mask tokens are not learned."""
        device = next(self.memory.model.parameters()).device
        ids, lengths = right_padded(texts, self.memory.mask_token_id)
        is_real = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(ids == self.memory.mask_token_id, IGNORE_INDEX).to(device)
        mask = None if bool(is_real.all()) else is_real.to(device)
        # One generator per row, all seeded alike: no row depends on the others of its batch.
        generator = [derive("memorize", self.seed) for _ in texts]
        with ExitStack() as stack:
            start = time.perf_counter()
            with self.display.bar(what, what, ids.shape[1]) as advance:
                # Other processes of a launch write other documents.
                writing = self.memory.write(
                    ids.to(device),
                    labels,
                    attention_mask=mask,
                    generator=generator,
                    is_alone=True,
                    on_chunk=advance,
                )
                stack.enter_context(writing)
            yield time.perf_counter() - start


def _reason(kept: bool, gate: dict[str, Any]) -> str:
    if gate["name"] == "none":
        return "kept without a gate"
    where = "held-out tokens" if gate["name"] == "held_out" else "tokens of the document"
    change = f"the loss on {gate['num_scored']} masked {where} went from {gate['before']:.3f} to {gate['after']:.3f}"
    return f"{'kept' if kept else 'not kept'}: {change} nats per token"
