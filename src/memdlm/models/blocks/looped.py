"""Networks that run the same blocks several times (ALBERT), seen as one block per pass.

What is put into such a block from outside acts in every pass. So each pass gets a twin of the block: modules of its own
around the same parameters. Inside `unrolled` the network's own loop runs the twins, one after the other; outside, the
network is what it was. `state_dict`, `parameters` and `named_modules` never show the twins.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, final
from weakref import WeakKeyDictionary

from torch import nn

from memdlm.errors import ConfigError

GROUPS = "albert_layer_groups"
"""The attribute of ALBERT's encoder that holds the blocks of its loop."""
LIVE = ("training", "gradient_checkpointing")
"""What may change on the network's own modules while twins run in their place."""


@final
class Passes:
    """The twins of one encoder's blocks, one per pass. The encoder is given anew to every method: it owns this."""

    def __init__(self) -> None:
        self._twins: dict[tuple[int, nn.Module], nn.Module] = {}
        self._users, self._lock = 0, threading.RLock()
        self._config: Any = None
        """The encoder's own configuration, while another stands in its place."""

    def of(self, encoder: nn.Module) -> list[nn.Module]:
        """Return the twins, in the order of the passes; they are the same ones every time."""
        with self._lock:
            owns = self._owns(encoder)
            if self._users == 0:
                for number, own in enumerate(owns):
                    self._renew(number, own)
            return [self._twins[number, own] for number, own in enumerate(owns)]

    def _sizes(self, encoder: nn.Module) -> tuple[int, int]:
        config: Any = encoder.config if self._config is None else self._config
        return int(config.num_hidden_layers), int(config.num_hidden_groups)

    def _owns(self, encoder: nn.Module) -> list[nn.Module]:
        """Return the block of every pass, as the network runs them."""
        layers, groups = self._sizes(encoder)
        blocks: Any = encoder._modules[GROUPS]
        return [blocks[index * groups // layers] for index in range(layers)]

    def _renew(self, number: int, own: nn.Module) -> nn.Module:
        """Make the twin of `own` in pass `number`, and those of its parts, what `own` is now."""
        twin = self._twins.setdefault((number, own), own.__class__.__new__(own.__class__))
        # Parameters and buffers are the same dictionaries: what replaces one replaces both. Hooks are copied, since
        # those that are put on a twin are meant for one pass.
        state = {name: copy(value) if isinstance(value, OrderedDict) else value for name, value in vars(own).items()}
        state["_modules"] = {
            name: None if part is None else self._renew(number, part) for name, part in own._modules.items()
        }
        twin.__dict__.clear()
        twin.__dict__.update(state)
        return twin

    def _block(self, number: int, own: nn.Module) -> nn.Module:
        for (where, module), twin in self._twins.items():
            if where == number:
                for name in LIVE:
                    if name in vars(module):
                        twin.__dict__[name] = vars(module)[name]
        return self._twins[number, own]

    @contextmanager
    def run_by(self, encoder: nn.Module) -> Iterator[None]:
        """Inside the block, `encoder` runs the twins."""
        with self._lock:
            self.of(encoder)
            if self._users == 0:
                owns, self._config = self._owns(encoder), encoder.config
                as_many: Any = copy(self._config)
                as_many.num_hidden_groups = len(owns)
                encoder.__dict__["config"] = as_many
                # Found before the module of that name, which stays where parameters are looked for.
                encoder.__dict__[GROUPS] = _Loop(self, owns)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    encoder.__dict__["config"], self._config = self._config, None
                    del encoder.__dict__[GROUPS]

    def bare(self, encoder: nn.Module) -> Mapping[str, Any]:
        """Return the attributes that a copy of `encoder` has in the place of those of `run_by`."""
        return {"config": encoder.config if self._config is None else self._config, GROUPS: ABSENT}


ABSENT = object()
"""Stands for an attribute that is not there."""


@final
class _Loop:
    """What the encoder takes for its list of blocks: number i gives the twin of pass i."""

    def __init__(self, passes: Passes, owns: list[nn.Module]) -> None:
        self._passes, self._owns = passes, owns

    def __getitem__(self, number: int) -> nn.Module:
        return self._passes._block(number, self._owns[number])


_KNOWN: "WeakKeyDictionary[nn.Module, Passes]" = WeakKeyDictionary()


def loop_of(network: nn.Module) -> tuple[str, nn.Module, Passes] | None:
    """Return the name and the module of the encoder in `network` that runs its blocks several times, and its passes."""
    for name, module in network.named_modules():
        if isinstance(module._modules.get(GROUPS), nn.ModuleList):
            passes = _KNOWN.setdefault(module, Passes())
            layers, groups = passes._sizes(module)
            return (name, module, passes) if groups < layers else None
    return None


def passes_of(network: nn.Module) -> dict[str, nn.Module] | None:
    """Return the blocks of a network that runs them several times, one per pass, by names as if it had as many."""
    found = loop_of(network)
    if found is None:
        return None
    name, encoder, passes = found
    before = f"{name}." if name else ""
    return {f"{before}{GROUPS}.{number}": twin for number, twin in enumerate(passes.of(encoder))}


@contextmanager
def unrolled(network: nn.Module) -> Iterator[None]:
    """Inside the block, a network that runs blocks several times runs those of `passes_of`; others are left alone."""
    found = loop_of(network)
    if found is None:
        yield
        return
    _, encoder, passes = found
    with passes.run_by(encoder):
        yield


def bare_of(network: nn.Module) -> dict[nn.Module, Mapping[str, Any]]:
    """Return what a copy of the network has in the place of what `unrolled` changed."""
    found = loop_of(network)
    return {} if found is None else {found[1]: found[2].bare(found[1])}


def check_not_looped(options: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError for a network of these options that runs its blocks several times: `what` is impossible."""
    if is_looped(options):
        raise ConfigError(
            f"{what}: the network runs its blocks several times ({options['num_hidden_layers']} layers, "
            f"{options['num_hidden_groups']} groups), and the memory adds something else to the same weights in every "
            "pass. Read it as a memory instead (--memory)."
        )


def is_looped(options: Mapping[str, Any]) -> bool:
    """Whether the fields of a configuration describe a network that runs its blocks several times."""
    layers, groups = options.get("num_hidden_layers"), options.get("num_hidden_groups")
    return isinstance(layers, int) and isinstance(groups, int) and groups < layers
