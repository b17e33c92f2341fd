"""torch.compile for the steps of a decoding: with static shapes, and only below the first fast weights or hooks."""

from collections.abc import Callable
from typing import Any, TypeAlias, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.models.blocks.experts import Experts
from memdlm.models.blocks.key_values import CachedPass
from memdlm.models.networks.backbone import Backbone
from memdlm.models.networks.requests import Request

Forward: TypeAlias = Callable[..., Any]
_COMPILED: "WeakKeyDictionary[nn.Module, dict[str, Forward]]" = WeakKeyDictionary()


@final
class CompiledSteps:
    """Runs a backbone's repeated passes over one canvas through torch.compile, in torch's `mode`.

    The modes "reduce-overhead" and "max-autotune" record CUDA graphs. A pass is compiled when its shape comes a second
    time: the pass over the prompt happens once per canvas, so compiling it is not worth it. Every compiled pass asks
    for as many positions as a block has, and attends to the whole canvas under a mask, so its shapes are the same in
    every step and every block. From the first block with fast weights (or hooks) on, the network runs uncompiled,
    because torch.compile would not notice changes there. Raises ConfigError when that is every block.
    """

    def __init__(self, backbone: Backbone, mode: str, most_asked: int) -> None:
        self.backbone, self.most_asked = backbone, most_asked
        self.first = first_changed_block(backbone)
        if self.first == 0:
            raise ConfigError(
                f"compile {mode!r} has nothing to compile: every block has fast weights or hooks. Leave compile out, "
                "or adapt fewer blocks (mem_inner_layer_fraction)."
            )
        forwards = _COMPILED.setdefault(backbone, {})
        if mode not in forwards:
            forwards[mode] = torch.compile(backbone.forward, mode=mode)
        self.forward = forwards[mode]
        self._seen: set[tuple[object, ...]] = set()

    def hidden(self, shown: Tensor, queries: Tensor, cached: CachedPass | None, masks: dict[str, Any]) -> Tensor:
        """Return the normalised states [R, n, D] at `queries` [R, n] of a pass over `shown` [R, W]."""
        shape = (tuple(shown.shape), cached is None, isinstance(getattr(cached, "rows", None), slice))
        is_repeated = shape in self._seen
        self._seen.add(shape)
        forward = self.forward if is_repeated else self.backbone.forward
        if cached is not None:
            _mark_static(cached)
            cached = cached.static()
        queries = _padded(queries, self.most_asked)
        if self.first == len(self.backbone.layers):
            return forward(shown, request=Request(cached=cached, queries=queries), **masks).last_hidden_state
        lower = forward(shown, request=Request(cached=cached, stop_layer=self.first), **masks).last_hidden_state
        # The output of a CUDA graph is valid until the graph runs again, which is after this pass.
        upper = Request(start_layer=self.first, cached=cached, queries=queries)
        return self.backbone(inputs_embeds=lower, request=upper, **masks).last_hidden_state


def first_changed_block(backbone: Backbone) -> int:
    """Return the index of the first block that hooks or fast weights change; the number of blocks if none does."""
    for index, layer in enumerate(backbone.layers):
        if any(_is_changed(module) for module in layer.modules()):
            return index
    return len(backbone.layers)


def _is_changed(module: nn.Module) -> bool:
    # torch.compile does not look at hooks again once it has compiled a module (skip_nnmodule_hook_guards).
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    return has_hooks or (isinstance(module, Experts) and module.additions is not None)


def _mark_static(cached: CachedPass) -> None:
    """Tell torch.compile that the buffers which a pass fills stay where they are.

    A CUDA graph may write only into such inputs; with other inputs torch gives up the graph without an error. Where no
    graph is recorded, this has no effect. torch notices the buffers of another canvas, and records a graph for them.
    """
    for buffer in cached.cache.buffers():
        torch._dynamo.mark_static_address(buffer, guard=False)


def _padded(queries: Tensor, width: int) -> Tensor:
    """Return `queries` [R, n] as [R, width]; the added ones ask for the first column, and are not read."""
    return torch.cat((queries, queries.new_zeros(len(queries), width - queries.shape[1])), dim=1)
