"""What memdlm asks of its networks in one pass beyond what any transformers model is asked, and what it then gets.

transformers' Trainer, lm-eval, PEFT and users call `forward(input_ids, attention_mask, ...)` and get a transformers
output. memdlm adds one argument, a `Request`, and gets a `Prediction`. It is an argument of `forward` and no method of
its own because what wraps a network (PEFT, DDP, FSDP, accelerate's autocast, torch.compile) acts on calls of `forward`.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from memdlm.models.blocks.key_values import Cached
from memdlm.types import PerToken


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Which part of a network runs, and what of its last states is wanted; by default all, and the logits.

    The pass can be cut in two: `stop_layer` ends it, and what it gives, handed back as `inputs_embeds` with the same
    number as `start_layer`, goes on from there.
    """

    start_layer: int | None = None
    """The first block that runs, on `inputs_embeds`; None: the pass begins before all blocks."""
    stop_layer: int | None = None
    """The block before which the pass ends; the prediction's `hidden` is what that block would be given."""
    cached: Cached | None = None
    """Keys and values that the ids, some columns of a canvas, attend to beside their own. It also says what may be
    seen; only networks that are `is_cacheable` can do it."""
    queries: Tensor | None = None
    """[B, n] int64: the places whose last state is wanted, all that the last block computes. `positions` then count in
    this grid (row * n + place). None: all."""
    hidden_only: bool = False
    """Nothing reaches the vocabulary projection; the prediction has `hidden` instead of `logits`."""
    per_token: PerToken | None = None
    """What is computed from the logits of every one of the `positions`, a cross-entropy for one; they are projected in
    chunks, and the prediction has `per_token` instead of `logits`."""
    weights: Tensor | None = None
    """[N] float: the prediction also has `total`, the sum of the values so weighted, which can be differentiated by the
    projection too without computing a chunk twice. The values then have no gradient."""
    is_constant: bool = False
    """Promises that the projection gets no gradient, and the values no second derivative."""


# FSDP2 casts the tensors that pytrees of a call's arguments hold.
pytree.register_dataclass(Request)


@dataclass
class Prediction(ModelOutput):
    """What a `Request` gets; fields that were not asked for are None.

    B rows, L places (n with `queries`), N `positions`. A transformers output, because wrappers know how to take one
    apart and build it again (hence not frozen).
    """

    logits: Tensor | None = None
    """[N, V]; without `positions` [B, L, V]."""
    hidden: Tensor | None = None
    """[N, D]; without `positions` [B, L, D]. Normalised, unless the pass stopped before the last block."""
    per_token: Tensor | None = None
    """[N], the values of the request's `per_token`."""
    total: Tensor | None = None
    """[], the weighted sum of `per_token`."""
