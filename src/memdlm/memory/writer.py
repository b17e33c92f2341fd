"""Writing one text into fast weights: in one piece, chunk after chunk, or all chunks by common updates."""

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from memdlm.diffusion.masking import Corrupted
from memdlm.memory.chunks import Text, joined
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import Chunk, InnerLoss, LocalSGD, Written, write_chunks
from memdlm.memory.learned import LearnedWrite
from memdlm.memory.outer_gradient import Exact, FirstOrder, OuterGradient, Untracked
from memdlm.memory.ranks import Ranks, is_sharded
from memdlm.memory.trajectory import Anchor, Draw, Strategy, drawn, sampled, scored_sets, trajectory, with_sizes
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.networks.lower_layers import LowerLayers, SharedLowerLayers
from memdlm.models.networks.patching import checkpointed
from memdlm.randomness import Randomness, offshoots, uniform
from memdlm.types import Ids, PositionSet

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A chunk, ready to be written."""

    chunk: Chunk
    epochs: int
    lower_layers: SharedLowerLayers | None
    anchor: Ids | None
    """The noised text itself, if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """What one write is done with: the parts of a memory, and how the caller will differentiate what it reads."""

    model: nn.Module
    config: MemoryConfig
    fast: FastWeights
    learned: LearnedWrite | None
    strategy: Strategy
    loss: InnerLoss
    update: LocalSGD
    adapted: Sequence[nn.Module]
    """The blocks from the first that has fast weights."""
    first_block: int
    mask_token_id: int
    right_shift_logits: bool
    pattern: AttentionPattern | None
    """Who sees whom."""
    process_group: ProcessGroup | None
    is_tracked: bool
    """The outer loss is differentiated through the write."""
    is_read_at_anchor: bool
    """The outer loss continues from what the write computed below the fast weights."""
    is_whole: bool
    """The text is one piece, whatever the configuration says."""

    def write(
        self, text: Text, randomness: Randomness, *, is_alone: bool, on_chunk: Callable[[int], None] | None
    ) -> tuple[Written, SharedLowerLayers | None]:
        """Do all `steps`; returns what they return."""
        steps = self.steps(text, randomness, is_alone=is_alone, on_chunk=on_chunk)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: tuple[Written, SharedLowerLayers | None] = end.value
                return found

    def steps(
        self, text: Text, randomness: Randomness, *, is_alone: bool, on_chunk: Callable[[int], None] | None
    ) -> Generator[None, None, tuple[Written, SharedLowerLayers | None]]:
        """Write `text`, gradient by gradient: between two of them the generator stops, and the network may be used.

        Returns what was done, and what is known below the fast weights of the text that is read. `on_chunk` is told
        how many columns are written.
        """
        length, overlap = (None, 0) if self.is_whole else (self.config.chunk_length, self.config.chunk_overlap)
        ranks = Ranks.present(self.process_group) if self.config.sync_inner and not is_alone else None
        parts = list(text.chunks(length, overlap))
        if length is not None:
            parts += [parts[-1].emptied()] * self._missing(len(parts), ranks, text.clean.device)
        # How many chunks there are is the batch's affair: what a row draws after the write must not depend on it.
        later = offshoots(randomness) if len(parts) > 1 else randomness
        sources = [randomness, *[later] * (len(parts) - 1)]

        def tell(done: int) -> None:
            columns = text.clean.shape[1]
            if on_chunk is not None:
                on_chunk(columns if length is None else min(columns, done * (length - overlap) + overlap))

        if len(parts) > 1 and self.config.chunk_update == "accumulated":
            # A later call sees the whole text, of which no chunk knows what lies below.
            written = yield from self._descend(list(map(self._prepared, parts, sources)), ranks, tell)
            return written, None
        pieces: list[Written] = []
        for number, (part, source) in enumerate(zip(parts, sources, strict=True), start=1):
            if number > 1:
                yield
            ready = self._prepared(part, source)
            piece = yield from self._descend([ready], ranks)
            pieces.append(piece)
            tell(number)
        if len(parts) > 1 or ready.lower_layers is None:
            return joined(pieces), None
        ready.lower_layers.retain(ready.anchor)
        return joined(pieces), ready.lower_layers

    def _missing(self, parts: int, ranks: Ranks | None, device: torch.device) -> int:
        """Return how many chunks less this rank has than another one that exchanges something in every chunk.

        It takes part in those with nothing to write.
        """
        if self.config.chunk_update == "accumulated":
            ranks = None  # the exchanges are those of the steps
        everyone = Ranks.present(self.process_group)
        if everyone is not None and is_sharded(self.model):
            ranks = everyone  # in every pass the ranks gather the weights
        return 0 if ranks is None else ranks.largest(parts, device) - parts

    def _descend(
        self, ready: Sequence[_Prepared], ranks: Ranks | None, on_chunk: Callable[[int], None] = lambda done: None
    ) -> Generator[None, None, Written]:
        with torch.set_grad_enabled(self.is_tracked):
            rates = None if self.learned is None else self.learned.rates(self.fast.tensors())
        return write_chunks(
            [each.chunk for each in ready],
            fast=self.fast,
            loss=self.loss,
            update=self.update,
            epochs=ready[0].epochs,
            ranks=ranks,
            rates=rates,
            on_chunk=on_chunk,
            around=partial(checkpointed, self.adapted if self.config.inner_gradient_checkpointing else ()),
        )

    def _prepared(self, part: Text, randomness: Randomness) -> _Prepared:
        """Draw the states of a chunk."""

        def draw() -> Tensor:
            return uniform(part.clean.shape, randomness, part.clean.device)

        anchor = anchor_of(part.clean, part.is_maskable, part.anchor, draw, self.config.prompt_mask_ratio)
        path, scored = self.strategy.path(anchor, draw), self.config.inner_loss_mask_mode
        chosen, fraction = scored_sets(path, scored), self.config.inner_score_fraction
        epochs = self.config.num_inner_epochs
        if fraction < 1:
            # Every update has a sample of its own, so that epochs see more of the text.
            chosen, epochs = [sampled(each, fraction, draw) for each in chosen * epochs], 1
        anchor, counts = with_sizes(anchor, chosen)
        if part.anchor is None and not any(counts) and bool(part.is_maskable.any()):
            log.warning(
                "nothing of a text of %d tokens is learned: no state scores a token with mem_masking_strategy=%s and "
                "mem_inner_loss_mask_mode=%s. Set mem_inner_loss_mask_mode=student_masked, or write a longer text.",
                int(part.is_maskable.sum()),
                self.config.masking_strategy,
                scored,
            )
        steps = trajectory(path, anchor, mask_token_id=self.mask_token_id, scored=scored)
        if fraction < 1:
            repeated = steps * self.config.num_inner_epochs
            steps = [replace(step, is_sampled=each) for step, each in zip(repeated, chosen, strict=True)]
        lower = self._lower_layers(anchor)
        denoise = self._denoiser(part, lower, is_constant=True)
        outer: OuterGradient = FirstOrder() if self.is_tracked else Untracked()
        if self.is_tracked and self.config.outer_gradient != "first_order":
            outer = Exact(self.model, self.fast, self.adapted, lambda below: self._denoiser(part, below), lower)
        chunk = Chunk(
            steps=steps,
            denoise=denoise,
            gate=None if self.learned is None else self.learned.gated(denoise.below, self.is_tracked),
            outer=outer,
            counts=counts,
            forget=lambda: None if lower is None else lower.retain(None),
        )
        return _Prepared(chunk, epochs, lower, anchor.ids)

    def _lower_layers(self, anchor: Anchor) -> SharedLowerLayers | None:
        if self.first_block == 0:
            return None
        return SharedLowerLayers(
            self.first_block,
            anchor=anchor.ids if self.is_read_at_anchor else None,
            is_traced=self.is_tracked and self.config.outer_gradient == "exact",
        )

    def _denoiser(self, part: Text, lower_layers: LowerLayers | None, *, is_constant: bool = False) -> ModelDenoiser:
        return ModelDenoiser(
            self.model,
            attention_mask=part.mask,
            attention_pattern=self.pattern,
            right_shift_logits=self.right_shift_logits,
            lower_layers=lower_layers,
            is_constant=is_constant,
        )


def anchor_of(clean: Ids, is_maskable: PositionSet, noised: Corrupted | None, draw: Draw, ratio: float) -> Anchor:
    """Return what is written: at the masks of `noised`, or each maskable token masked with probability `ratio`.

    Of a text that is drawn here at least one token is masked, if one can be.
    """
    if noised is None:
        is_masked = drawn(is_maskable, draw(), ratio)
        t = torch.full(clean.shape[:1], ratio, device=clean.device)
        return Anchor(clean=clean, is_maskable=is_maskable, is_masked=is_masked, t=t)
    is_masked = noised.is_masked & is_maskable
    is_same = (is_masked == noised.is_masked).all()
    return Anchor(
        clean=clean, is_maskable=is_maskable, is_masked=is_masked, t=noised.t, ids=noised.ids, is_same=is_same
    )
