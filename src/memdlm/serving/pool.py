"""The batch of an engine: rows of different texts, of which some join and others leave between two steps.

S rows of the pool   T its columns   R rows of one pass   N predicted positions   V vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, final

import torch
from torch import Tensor

from memdlm.diffusion.choice import TokenSampler
from memdlm.diffusion.guidance import guided
from memdlm.diffusion.soft_masking import SoftMask
from memdlm.inference.decoder import Decoder
from memdlm.inference.denoiser import CanvasDenoiser, Meter
from memdlm.inference.prompt_cache import Prefill, PromptCache
from memdlm.inference.soft import SoftFeedback
from memdlm.inference.views import Asked, FinishedBlocks, View, WholeRows
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.serving.live import Stacks
from memdlm.serving.responses import Predicted, Running

UNEVEN = 2
"""A pass takes rows whose widths differ by less than this factor: a long prompt must not stretch everybody's row."""
ROUND = 64
"""The pool's columns are a multiple of this many, so that they seldom grow."""
MOST_PROMPTS = 512
"""Prompts in the prefix cache, whatever they take."""

Kind: TypeAlias = tuple[bool, AttentionPattern | None, bool, SoftMask | None]
"""What all rows of a pass have in common: whether finished blocks are kept, pattern, shifted logits, soft-masking."""


@final
class Pool:
    """Rows of responses that are decoded together. Rows in use come first, without a gap."""

    def __init__(self, decoder: Decoder, slots: int, prefix_bytes: int) -> None:
        self.decoder, self.slots = decoder, slots
        self.device = next(decoder.model.parameters()).device
        self.owners: list[Running] = []
        """By row; a guided response owns two."""
        self.stacks = Stacks(decoder.model)
        self.meter = Meter()
        self._ids = torch.zeros(slots, 0, dtype=torch.int64)
        self._lengths = torch.zeros(slots, dtype=torch.int64)
        self._whole = WholeRows(self._lengths)
        self._finished = FinishedBlocks(self._lengths, 1, 0)
        network = unwrap(decoder.model)
        self.prefixes: PromptCache | None = None
        if isinstance(network, MaskedDiffusionLM) and network.model.is_cacheable and prefix_bytes:
            self.prefixes = PromptCache(decoder.model, max_prompts=MOST_PROMPTS, max_bytes=prefix_bytes)
        self._prefill = None if self.prefixes is None else Prefill(self.prefixes, self._finished)
        self._denoisers: dict[Kind, CanvasDenoiser] = {}

    @property
    def room(self) -> int:
        """Rows that nobody uses."""
        return self.slots - len(self.owners)

    def admit(self, running: Running) -> None:
        """Give a response its rows."""
        self._widen(running.filling.ids.shape[1])
        if running.memory is not None and self.prefixes is not None:
            self.prefixes.lower(running.memory.first_block)
            if self.prefixes.first == 0:
                self.prefixes = self._prefill = None
                for denoiser in self._denoisers.values():
                    denoiser.prefill = None
        pattern = running.job.decoder.pattern
        for _ in range(running.num_rows):
            row = len(self.owners)
            self.owners.append(running)
            running.rows.append(row)
            self._lengths[row] = int(running.job.canvas.lengths[0])
            self._finished.admit(row, pattern.block if isinstance(pattern, BlockCausal) else 1)
            if self._prefill is not None:
                self._prefill.admit(row)
            for denoiser in self._denoisers.values():
                if denoiser.soft is not None:
                    denoiser.soft.admit(row)

    def leave(self, running: Running) -> None:
        """Take a response's rows back; the last rows move into the gap."""
        for row in sorted(running.rows, reverse=True):
            last = len(self.owners) - 1
            if row < last:
                moved = self.owners[last]
                self.owners[row] = moved
                moved.rows[moved.rows.index(last)] = row
                self._lengths[row] = self._lengths[last]
                self._finished.move(last, row)
                if self._prefill is not None:
                    self._prefill.move(last, row)
                for denoiser in self._denoisers.values():
                    if denoiser.soft is not None:
                        denoiser.soft.move(last, row)
            self.owners.pop()
        running.rows.clear()
        kinds = {self._kind(each) for each in self.owners}
        self._denoisers = {kind: each for kind, each in self._denoisers.items() if kind in kinds}

    def _widen(self, length: int) -> None:
        """Make room for rows of `length` columns; an empty pool lets go of much more than that."""
        wanted, have = -(-length // ROUND) * ROUND, self._ids.shape[1]
        if not self.owners and have > 2 * wanted:
            self._finished.cache.forget()
            self._finished.cache.length = wanted
            self._ids = self._ids.new_zeros(self.slots, wanted)
        elif wanted > have:
            self._finished.cache.grow(wanted)
            self._ids = self._ids.new_zeros(self.slots, wanted)
            for denoiser in self._denoisers.values():
                if denoiser.soft is not None:
                    denoiser.soft.grow(wanted)

    def groups(self, responses: Sequence[Running]) -> list[list[Running]]:
        """Return which responses go through the network together: those that are run alike, of similar width."""
        by_kind: dict[Kind, list[Running]] = {}
        for each in responses:
            by_kind.setdefault(self._kind(each), []).append(each)
        groups = []
        for kind, alike in by_kind.items():
            widths = self._widths(kind, alike)
            alike.sort(key=lambda each: widths[each], reverse=True)
            group: list[Running] = []
            for each in alike:
                if group and widths[each] * UNEVEN <= widths[group[0]]:
                    groups.append(group)
                    group = []
                group.append(each)
            groups.append(group)
        return groups

    @torch.no_grad()
    def predict(self, responses: Sequence[Running]) -> dict[Running, Predicted]:
        """Run one pass over `responses`, one group; waits for the device once."""
        rows = sorted((row, each) for each in responses for row in each.rows)
        kind = self._kind(responses[0])
        for each in responses:
            for row, ids in zip(each.rows, each.shown(), strict=True):
                self._ids[row, : len(ids)] = ids
        positions = self._positions(rows)
        widths = self._widths(kind, responses)
        logits = self._denoiser(kind).logits(self._ids.to(self.device, non_blocking=True), positions)
        if kind[0] and self._prefill is not None:
            for each in responses:
                if each.job.meter.passes == 0:
                    each.job.meter.reused = int(self._prefill.restored[each.rows].sum())
                    widths[each] -= each.job.meter.reused
        return self._chosen(responses, self._lines(rows, logits), logits, widths)

    def _positions(self, rows: Sequence[tuple[int, Running]]) -> Tensor:
        length = self._ids.shape[1]
        return torch.cat([_wanted(owner) + row * length for row, owner in rows])

    @staticmethod
    def _lines(rows: Sequence[tuple[int, Running]], logits: Tensor) -> dict[Running, list[Tensor]]:
        """Return the logits [n, V] of every response, one tensor per row of it."""
        parts = logits.split([_wanted(owner).numel() for _, owner in rows])
        found = {row: part for (row, _), part in zip(rows, parts, strict=True)}
        return {owner: [found[row] for row in owner.rows] for _, owner in rows}

    def _chosen(
        self,
        responses: Sequence[Running],
        lines: dict[Running, list[Tensor]],
        logits: Tensor,
        widths: dict[Running, int],
    ) -> dict[Running, Predicted]:
        """Choose tokens for all responses that have the same sampler at once, each from its own draws."""
        by_sampler: dict[TokenSampler, list[Running]] = {}
        for each in sorted(responses, key=lambda each: each.rows[0]):
            by_sampler.setdefault(each.job.decoder.sampler, []).append(each)
        chosen = []
        for sampler, alike in by_sampler.items():
            counts = torch.tensor([_wanted(each).numel() for each in alike])
            is_all = len(alike) == len(lines) and all(len(each.rows) == 1 for each in alike)
            mixed = logits if is_all else torch.cat([_mixed(each, lines[each]) for each in alike])
            generators = [each.job.randomness[0] for each in alike]  # type: ignore[index]
            token, sure = sampler.choose(mixed, generators, torch.arange(len(alike)).repeat_interleave(counts))
            chosen.append((alike, counts.tolist(), token, sure, mixed.amax(-1).isfinite()))
        found = {}
        for alike, sizes, token, sure, is_sound in chosen:
            # The first copy waits for the device; it has computed the others by then.
            tokens, confidences, sound = _on_the_host(token), _on_the_host(sure), _on_the_host(is_sound)
            parts = zip(tokens.split(sizes), confidences.split(sizes), sound.split(sizes), strict=True)
            for each, (token, sure, is_sound) in zip(alike, parts, strict=True):
                found[each] = Predicted(token, sure, bool(is_sound.all()), widths[each])
        return found

    def _widths(self, kind: Kind, responses: Sequence[Running]) -> dict[Running, int]:
        """Return how many columns of every response a pass would take, all its rows together."""
        rows = sorted((row, each) for each in responses for row in each.rows)
        asked = Asked.of(self._positions(rows), self._ids.shape[1])
        part = self._view(kind).plan(asked)
        found = dict.fromkeys(responses, 0)
        for (_, owner), width in zip(rows, (part.last - part.first).tolist(), strict=True):
            found[owner] += width
        return found

    def _kind(self, running: Running) -> Kind:
        decoder, options = running.job.decoder, running.job.decoder.options
        keeps = decoder.is_cacheable and isinstance(decoder.pattern, BlockCausal)
        # With kept blocks, every row has its own pattern.
        pattern = None if keeps else decoder.pattern
        soft = options.soft_masking(decoder.special.mask) if options.soft_mask else None
        return keeps, pattern, options.right_shift_logits, soft

    def _view(self, kind: Kind) -> View:
        return self._finished if kind[0] else self._whole

    def _denoiser(self, kind: Kind) -> CanvasDenoiser:
        if kind not in self._denoisers:
            keeps, pattern, right_shift, soft = kind
            is_ours = isinstance(unwrap(self.decoder.model), MaskedDiffusionLM)
            self._denoisers[kind] = CanvasDenoiser(
                self.decoder.model,
                self._view(kind),
                pattern=pattern if is_ours else None,
                right_shift_logits=right_shift,
                meter=self.meter,
                of_rows=self._reading,
                prefill=self._prefill if keeps else None,
                soft=None if soft is None else SoftFeedback(soft, self.decoder.model, self._ids.shape, self.device),
            )
        return self._denoisers[kind]

    @contextmanager
    def _reading(self, rows: Tensor) -> Iterator[None]:
        """Let calls on `rows` [R] read their responses' memories."""
        found = self.stacks.of([self.owners[row].memory for row in rows.tolist()])
        if found is None:
            yield
            return
        fast, tensors, samples = found
        with fast.holding(tensors, (samples, None)):
            yield


def _on_the_host(tensor: Tensor) -> Tensor:
    """Copy what a step decides on to the CPU; the only wait of a step."""
    return tensor.cpu()


def _wanted(running: Running) -> Tensor:
    assert running.wanted is not None
    return running.wanted


def _mixed(running: Running, lines: Sequence[Tensor]) -> Tensor:
    """Return the logits [n, V] from which a response's tokens are chosen."""
    if len(lines) == 1:
        return lines[0]
    return guided(lines[0], lines[1], running.job.decoder.options.cfg_scale)
