"""A prompt that many texts begin with, run once: exact where later tokens cannot change it (block-causal families).

P tokens of the prompt   n of them in finished blocks   L tokens of a text
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from memdlm.models.blocks.key_values import CachedPass, KeyValueCache, PrefixCachedPass
from memdlm.models.blocks.masks import BlockCausal
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.models.networks.requests import Request
from memdlm.types import Denoise, Ids, Logits, PerToken, Positions


def can_share(model: nn.Module) -> bool:
    """Whether `model` can keep a prompt's keys and values under a block-causal pattern."""
    network = unwrap(model)
    return isinstance(network, MaskedDiffusionLM) and network.model.is_cacheable


@final
class SharedPrompt(Denoise):
    """Predicts positions of texts [B, L] that all begin with one prompt, whose finished blocks are not run again.

    Belongs to one state of the network (one memory). `seen` is n; positions before it must not be asked for.
    """

    def __init__(self, model: nn.Module, prompt_ids: Tensor, pattern: BlockCausal) -> None:
        self.model, self.block = model, pattern.block
        self.seen = prompt_ids.numel() // self.block * self.block
        self.cache = KeyValueCache(1, self.seen)
        if self.seen:
            columns = torch.arange(self.seen, device=prompt_ids.device)
            cached = CachedPass(self.cache, slice(0, 1), columns[None], 0, self.seen, self._visible(columns))
            # Only keys and values are needed, so the last layer computes a single output.
            one = columns.new_zeros(1, 1)
            with torch.no_grad():
                request = Request(cached=cached, queries=one, hidden_only=True)
                model(input_ids=prompt_ids[None, : self.seen], request=request)

    def logits(self, ids: Ids, positions: Positions) -> Logits:
        """Return [N, V] logits of the tokens at `positions` of the texts `ids` [B, L]."""
        return self._call(ids, positions).logits

    def hidden(self, ids: Ids, positions: Positions) -> Tensor:
        """Return [N, D] normalised last hidden states at `positions`."""
        return self._call(ids, positions, hidden_only=True).hidden

    def read(self, ids: Ids, positions: Positions, per_token: PerToken) -> Tensor:
        """Return [N] values, without holding all logits."""
        return self._call(ids, positions, per_token=per_token).per_token

    def _call(self, ids: Ids, positions: Positions, **wanted: Any) -> Any:
        length = ids.shape[1]
        columns = torch.arange(self.seen, length, device=ids.device)
        cached = PrefixCachedPass(self.cache, columns[None], self._visible(columns))
        places = positions // length * len(columns) + positions % length - self.seen
        return self.model(input_ids=ids[:, self.seen :], positions=places, request=Request(cached=cached, **wanted))

    def _visible(self, columns: Tensor) -> Tensor:
        seen = torch.arange(int(columns[-1]) + 1, device=columns.device)
        return ((seen // self.block) <= (columns[:, None] // self.block))[None, None]
