"""Masked diffusion models of other families, called so that only chosen positions reach their vocabulary projection.

BERT-like masked language models, and autoregressive decoders that were converted to look both ways. A pass can be cut
in two at a block, as in our families, without re-implementing any layer: the blocks that are not wanted pass on their
input, and the network's own code around them (masks, positions, final norm) runs every time.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memdlm.errors import ConfigError, DataError
from memdlm.models.blocks.looped import unrolled
from memdlm.models.blocks.masks import AttentionPattern, Full, attention_scores_mask
from memdlm.models.blocks.structure import blocks_of
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.patching import in_this_thread, patched
from memdlm.types import Ids, Logits, Positions


def chooses_positions(network: nn.Module) -> bool:
    """Whether `network` itself takes `positions`, as our families do."""
    return "positions" in inspect.signature(network.forward).parameters


def check_places(model: nn.Module, length: int, name: str) -> None:
    """Raise DataError when a text of `length` tokens is longer than the model's table of positions, if it has one."""
    if chooses_positions(unwrap(model)):
        return  # our families compute positions
    for path, module in unwrap(model).named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts from behind its padding index.
            places = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if length > places:
                raise DataError(
                    f"{name} has {length} tokens, but the model has a table of {places} positions; shorten it."
                )


@final
class ForeignModel:
    """A transformers model that knows nothing of `positions` and `attention_pattern`.

    If it is a body with a head on top, like transformers' language models, positions are chosen between the two;
    otherwise from all logits. `network` is what is inside the wrappers of `model`.
    """

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        self.model, self.network = model, network
        body = network.base_model if isinstance(network, PreTrainedModel) else network
        self.body = None if body is network else body
        takes = inspect.signature(network.forward).parameters
        # A cache that nobody reads would cost memory, and converted decoders make one by default.
        self.fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        self._returned: Callable[[Tensor], Any] = _alone

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

    def below(self, ids: Ids, mask: Tensor | None, pattern: AttentionPattern | None, *, stop: int) -> Tensor:
        """Return the input [B, L, D] that block `stop`, which is not the first, would get for `ids` [B, L]."""
        blocks = blocks_of(self.network)
        last, caught = blocks[stop - 1].forward, []

        def observe(*args: Any, **kwargs: Any) -> Any:
            out = last(*args, **kwargs)
            self._returned = _alone if isinstance(out, Tensor) else _with(out[1:])
            return out

        def catch(*args: Any, **kwargs: Any) -> Any:
            caught.append(_first(args, kwargs))
            return self._returned(caught[0])

        idle = dict.fromkeys(blocks[stop + 1 :], self._hand_on)
        with unrolled(self.network), patched({blocks[stop - 1]: observe, blocks[stop]: catch, **idle}):
            # Called through the wrappers: an outer adapter, for example, may have to prepare its layers.
            self._run_body(ids, mask, pattern)
        return caught[0]

    @contextmanager
    def resumed(self, start: int, hidden: Tensor) -> Iterator[None]:
        """Inside the block, calls on the ids that gave `hidden` ([B, L, D], from `below`) begin at block `start`."""
        blocks = blocks_of(self.network)
        own = blocks[start].forward

        def begin(*args: Any, **kwargs: Any) -> Any:
            if args:
                return own(hidden, *args[1:], **kwargs)
            return own(**{**kwargs, next(iter(kwargs)): hidden})

        passed = dict.fromkeys(blocks[:start], self._hand_on)
        with unrolled(self.network), patched({**passed, blocks[start]: begin}):
            yield

    def _run_body(self, ids: Ids, mask: Tensor | None, pattern: AttentionPattern | None) -> None:
        arguments = self._arguments(ids, mask, pattern)
        if self.body is None:
            self.model(**arguments)
            return
        none = torch.zeros(1, dtype=torch.int64, device=ids.device)
        with _only(self.body, none):
            self.model(**arguments)

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        return self._returned(_first(args, kwargs))

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
    """Inside the block, let `body` return only the states at `positions`, [1, N, D]."""

    is_mine = in_this_thread()

    def choose(module: nn.Module, arguments: Any, out: Any) -> Any:
        if not is_mine():
            return out
        chosen = out.last_hidden_state.flatten(0, 1).index_select(0, positions)[None]
        return type(out)(**{**out, "last_hidden_state": chosen})

    handle = body.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a block's arguments: they come first."""
    hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
    return hidden


def _alone(hidden: Tensor) -> Any:
    return hidden


def _with(rest: tuple[Any, ...]) -> Callable[[Tensor], Any]:
    return lambda hidden: (hidden, *rest)
