"""Masked diffusion models of other families, called so that only chosen positions reach their vocabulary projection.

BERT-like masked language models, and autoregressive decoders that were converted to look both ways.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memdlm.errors import ConfigError
from memdlm.models.masks import AttentionPattern, Full, attention_scores_mask
from memdlm.types import Ids, Logits, Positions


def chooses_positions(network: nn.Module) -> bool:
    """Return whether `network` itself takes `positions`, as our families do."""
    return "positions" in inspect.signature(network.forward).parameters


@final
class ForeignModel:
    """A transformers model that knows nothing of `positions` and `attention_pattern`.

    Where it is a body with a head on top, as transformers' language models are, positions are chosen between the
    two; otherwise among all logits. `network` is what is inside the wrappers of `model`.
    """

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        self.model, self.network = model, network
        body = network.base_model if isinstance(network, PreTrainedModel) else network
        self.body = None if body is network else body
        takes = inspect.signature(network.forward).parameters
        # A cache that nobody reads would cost memory, and converted decoders make one by default.
        self.fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}

    def logits(self, ids: Ids, positions: Positions, mask: Tensor | None, pattern: AttentionPattern | None) -> Logits:
        """Return [N, V] logits at `positions` of `ids` [B, L]."""
        arguments = self._arguments(ids, mask, pattern)
        if self.body is None:
            return self.model(**arguments).logits.flatten(0, 1).index_select(0, positions)
        with _only(self.body, positions):
            return self.model(**arguments).logits.squeeze(0)

    def hidden(self, ids: Ids, positions: Positions, mask: Tensor | None, pattern: AttentionPattern | None) -> Tensor:
        """Return [N, D] last hidden states of the body at `positions`; raises ConfigError where there is no body."""
        if self.body is None:
            raise ConfigError(
                f"{type(self.network).__name__} has no base model whose last hidden states could be compared; "
                "use mem_inner_loss_type ce, distill or distill_reverse."
            )
        states = self.body(**self._arguments(ids, mask, pattern)).last_hidden_state
        return states.flatten(0, 1).index_select(0, positions)

    def _arguments(self, ids: Ids, mask: Tensor | None, pattern: AttentionPattern | None) -> dict[str, Any]:
        if pattern is not None and not isinstance(pattern, Full):
            like = torch.empty(*ids.shape, 0, dtype=next(self.network.parameters()).dtype, device=ids.device)
            is_eager = getattr(self.network.config, "_attn_implementation", "eager") != "sdpa"
            mask = attention_scores_mask(mask, like, pattern=pattern, additive=is_eager)
            if mask is not None:
                mask = mask.expand(ids.shape[0], -1, -1, -1)
        elif mask is not None and mask.dim() == 2:
            mask = mask.long()
        return {"input_ids": ids, "attention_mask": mask, **self.fixed}


@contextmanager
def _only(body: nn.Module, positions: Positions) -> Iterator[None]:
    """Let `body` hand on [1, N, D] states, those at `positions`, inside the block."""

    def choose(module: nn.Module, arguments: Any, out: Any) -> Any:
        chosen = out.last_hidden_state.flatten(0, 1).index_select(0, positions)[None]
        return type(out)(**{**out, "last_hidden_state": chosen})

    handle = body.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()
