"""A model as the denoiser of one canvas: only rows with asked positions run, and only these reach the vocabulary."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from memdlm.inference.compiled import CompiledSteps
from memdlm.inference.prompt_cache import Prefill
from memdlm.inference.soft import SoftFeedback
from memdlm.inference.views import Asked, Pass, View, WholeRows, contiguous
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.requests import Request
from memdlm.types import Denoise, Ids, Logits, Positions

OfRows: TypeAlias = Callable[[Tensor], AbstractContextManager[None]]
"""Makes the network read only the memories of some rows of the canvas."""


@dataclass(slots=True)
class Meter:
    """How much work decoding gave to the network."""

    passes: int = 0
    positions: int = 0
    reused: int = 0
    """Positions of prompts whose lower blocks a prompt cache held; only the upper blocks ran on them."""


@final
class CanvasDenoiser(Denoise):
    """Predicts positions of a canvas [B, T] whose row i ends before `lengths[i]`; columns beyond that are ignored.

    Rows without asked positions do not run. In our families the last layer computes only the asked positions; other
    networks, and those with shifted logits, run whole rows. With `soft`, the last prediction for a position that is
    still masked is mixed into its input.
    """

    def __init__(
        self,
        model: nn.Module,
        view: View,
        *,
        pattern: AttentionPattern | None,
        right_shift_logits: bool = False,
        meter: Meter | None = None,
        of_rows: OfRows | None = None,
        prefill: Prefill | None = None,
        compiled: CompiledSteps | None = None,
        soft: SoftFeedback | None = None,
    ) -> None:
        self.soft = soft
        self.model, self.view, self.pattern = model, view, pattern
        self.right_shift_logits = right_shift_logits
        self.meter = Meter() if meter is None else meter
        self.of_rows, self.prefill, self.compiled = of_rows, prefill, compiled
        self.is_ours = isinstance(unwrap(model), MaskedDiffusionLM)

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions` of the canvas `ids` [B, T]."""
        asked = Asked.of(positions, ids.shape[1], right_shift=self.right_shift_logits and self.is_ours)
        if self.prefill is not None and self.prefill.is_due(asked):
            self._restore(self.prefill, ids, asked)
        part = self.view.plan(asked)
        columns = part.columns
        rows = contiguous(asked.rows, ids.device)
        shown = ids[rows].gather(1, columns.clamp(max=ids.shape[1] - 1).to(ids.device, non_blocking=True))
        self.meter.passes += 1
        self.meter.positions += shown.numel()
        with ExitStack() as around:
            around.enter_context(self._reading(asked.rows))
            if self.soft is not None:
                places = asked.rows[:, None] * ids.shape[1] + columns.clamp(max=ids.shape[1] - 1)
                around.enter_context(self.soft.shown(shown, places.to(ids.device, non_blocking=True)))
            found = self._ours(ids, shown, asked, part) if self.is_ours else self._foreign(shown, asked, part)
        self.view.done(asked, part)
        if self.soft is not None:
            self.soft.learn(found, positions)
        return found

    def hidden(self, ids: Ids, positions: Positions) -> Tensor:
        """Raise NotImplementedError: decoding needs no hidden states."""
        raise NotImplementedError("a canvas denoiser gives logits; use ModelDenoiser for hidden states.")

    def _reading(self, rows: Tensor) -> AbstractContextManager[None]:
        """Let calls on `rows` [R] of the canvas read their own memories."""
        return nullcontext() if self.of_rows is None else self.of_rows(rows)

    def _restore(self, prefill: Prefill, ids: Ids, asked: Asked) -> None:
        """Restore known beginnings of prompts; only the blocks that a memory changes run on them."""
        known = prefill.restore(ids, asked)
        if known is None:
            return
        rows, hidden, part = known
        self.meter.reused += int(part.last.sum())
        if prefill.cache.first == len(prefill.cache.network.model.layers):
            return
        # Only keys and values are needed, so the last block computes a single output.
        one = torch.zeros(len(rows), 1, dtype=torch.int64, device=ids.device)
        with self._reading(rows):
            cached = self.view.cached(rows, part, ids.device)
            upper = Request(start_layer=prefill.cache.first, cached=cached, queries=one, hidden_only=True)
            self.model(inputs_embeds=hidden, request=upper)

    def _ours(self, ids: Ids, shown: Tensor, asked: Asked, part: Pass) -> Logits:
        queries, places = asked.queries(part.first)
        cached = self.view.cached(asked.rows, part, shown.device)
        masks = {"attention_mask": self._keep(part, shown), "attention_pattern": self.pattern} if cached is None else {}
        begin: dict[str, Any] = {"input_ids": shown}
        start = None
        if self.prefill is not None and self.prefill.is_due(asked):
            start = self.prefill.cache.first
            lower = self.model(input_ids=shown, request=Request(cached=cached, stop_layer=start)).hidden
            self.prefill.keep(ids, asked, part, lower)
            begin = {"inputs_embeds": lower}
        elif self.compiled is not None:
            width = queries.shape[1]
            hidden = self.compiled.hidden(shown, queries.to(shown.device, non_blocking=True), cached, masks)
            return self._network().predict(
                hidden[:, :width].flatten(0, 1).index_select(0, places.to(shown.device, non_blocking=True))
            )
        queries = queries.to(shown.device, non_blocking=True)
        places = places.to(shown.device, non_blocking=True)
        request = Request(start_layer=start, cached=cached, queries=queries)
        return self.model(**begin, positions=places, request=request, **masks).logits

    def _network(self) -> MaskedDiffusionLM:
        network = unwrap(self.model)
        assert isinstance(network, MaskedDiffusionLM)
        return network

    def _foreign(self, shown: Tensor, asked: Asked, part: Pass) -> Logits:
        denoise = ModelDenoiser(
            self.model,
            attention_mask=self._keep(part, shown),
            attention_pattern=self.pattern,
            right_shift_logits=self.right_shift_logits,
        )
        places = asked.row_of * shown.shape[1] + asked.columns - part.first[asked.row_of]
        return denoise.logits(shown, places.to(shown.device, non_blocking=True))

    @staticmethod
    def _keep(part: Pass, shown: Ids) -> Tensor | None:
        """Return [R, W] bool, or None without padding: a mask would only rule out the fast attention kernels."""
        if part.start is not None:
            return None
        return (part.columns < part.last[:, None]).to(shown.device, non_blocking=True)


__all__ = ["CanvasDenoiser", "Meter", "OfRows", "WholeRows"]
