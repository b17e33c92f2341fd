"""What memdlm asks of its networks in one pass, beyond what transformers models offer, and what it gets back.

transformers' Trainer, lm-eval, PEFT and users call `forward(input_ids, attention_mask, ...)` and get a transformers
output. memdlm adds one argument, a `Request`, and gets a `Prediction`. The request is an argument of `forward`, not a
method of its own, because the wrappers of a network (PEFT, DDP, FSDP, accelerate's autocast, torch.compile) act on
calls of `forward`.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from memdlm.models.blocks.key_values import Cached
from memdlm.types import PerToken


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Which part of a network runs, and what it returns; by default all of it runs, and it returns logits.

    The pass can be cut in two. The first call ends before block `stop_layer`. The second call goes on from there: it
    takes the result as `inputs_embeds`, and the same number as `start_layer`.
    """

    start_layer: int | None = None
    """The first block that runs, on `inputs_embeds`; None: the pass begins before all blocks."""
    stop_layer: int | None = None
    """The block before which the pass ends; the prediction's `hidden` is what that block would be given."""
    cached: Cached | None = None
    """Keys and values that the ids, some columns of a canvas, attend to beside their own. It also says what may be
    seen. Only networks with `is_cacheable` take it."""
    queries: Tensor | None = None
    """[B, n] int64: the places whose last state is wanted; the last block computes only these. `positions` then count
    in this grid (row * n + place). None: all."""
    hidden_only: bool = False
    """Nothing reaches the vocabulary projection; the prediction has `hidden` instead of `logits`."""
    per_token: PerToken | None = None
    """What is computed from the logits of each of the `positions`, for example a cross-entropy. They are projected in
    chunks, and the prediction has `per_token` instead of `logits`."""
    weights: Tensor | None = None
    """[N] float: the prediction also has `total`, the sum of the values times these weights. It has a gradient, also
    for the projection, and no chunk is computed twice. The values then have no gradient."""
    is_constant: bool = False
    """Promises that the projection gets no gradient, and the values no second derivative."""


# FSDP2 casts the tensors that pytrees of a call's arguments hold.
pytree.register_dataclass(Request)


@dataclass
class Prediction(ModelOutput):
    """What a `Request` gets; fields that were not asked for are None.

    B rows, L places (n with `queries`), N `positions`. It is a transformers output, because wrappers can
    take one apart and build it again. Hence it is not frozen.
    """

    logits: Tensor | None = None
    """[N, V]; without `positions` [B, L, V]."""
    hidden: Tensor | None = None
    """[N, D]; without `positions` [B, L, D]. Normalised, unless the pass stopped before the last block."""
    per_token: Tensor | None = None
    """[N], the values of the request's `per_token`."""
    total: Tensor | None = None
    """[], the weighted sum of `per_token`."""
