"""Inputs that mix tokens: at some positions, the next calls get a mix of embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.patching import in_this_thread
from memdlm.types import Positions


@contextmanager
def blended_inputs(
    model: nn.Module, positions: Positions, tokens: Tensor, weights: Tensor, share: Tensor
) -> Iterator[None]:
    """Inside the block, mix other embeddings into those at `positions` [N] of every call of `model`.

    The embedding e at position n becomes (1 - `share[n]`) e + `share[n]` m, where m is the sum over k of
    `weights[n, k]` times the embedding of `tokens[n, k]`. Gradients reach the table through both parts. All calls in
    the block must be of the same shape.
    """

    is_mine = in_this_thread()

    def mix(table: nn.Embedding, _: Any, output: Tensor) -> Tensor:
        if not is_mine():
            return output
        flat = output.flatten(0, 1)
        # The table's weights, not a call of the table: inside this hook, sharded weights are whole.
        others = (F.embedding(tokens, table.weight) * weights[..., None].to(output.dtype)).sum(1)
        own = share[:, None].to(output.dtype)
        return flat.index_copy(0, positions, (1 - own) * flat[positions] + own * others).view_as(output)

    handle = unwrap(model).get_input_embeddings().register_forward_hook(mix)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
