"""The values of an open memory, and how a network reads them: attached from outside, for the length of a block.

Fast weights are never parameters or buffers of the model, so they cannot reach its state dict, its optimizer, its
gradient norm or its checkpoints. A forward hook adds them to a linear layer's output; stacked experts ask an
`ExpertAdditions` object. One memory can be open per network, and only the thread that opened it reads it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.memory.adapters import Adapter, check_rows
from memdlm.memory.dropout import InputDropout
from memdlm.memory.open_block import OpenBlock, claimed
from memdlm.memory.sites import Site
from memdlm.models.blocks.experts import ExpertAdditions, Experts, Routing
from memdlm.models.blocks.looped import bare_of, unrolled
from memdlm.models.networks.patching import copied_bare
from memdlm.options import shortened
from memdlm.randomness import Randomness, seed_tensor

State: TypeAlias = tuple[int, InputDropout | None]
"""How many samples there are, and what a write drops."""


@final
class FastWeights:
    """phi: for every site, the adapter's tensors. `blocks` are the adapted blocks of `network`."""

    def __init__(
        self, sites: Sequence[Site], adapter: Adapter, *, network: nn.Module, blocks: Sequence[nn.Module]
    ) -> None:
        self.sites, self.adapter, self.network, self.blocks = tuple(sites), adapter, network, tuple(blocks)
        self.num_samples = 0
        self._values: dict[str, tuple[Tensor, ...]] = {}
        self._dropout: InputDropout | None = None
        self._is_dropping = False
        self._rows_of_sample = 1
        self._block: OpenBlock | None = None
        self._attachments: ExitStack | None = None
        self._some: tuple[tuple[int, ...], dict[str, tuple[Tensor, ...]]] | None = None
        self._is_part = False
        self.is_spread = False
        """Whether rows and memories have other numbers, see `read_by`."""

    def __getstate__(self) -> dict[str, Any]:
        if self._block is not None:
            raise ConfigError(f"a memory is not copied while it is open: {self._block}. Leave the block first.")
        return self.__dict__

    def reset(
        self,
        num_samples: int,
        randomness: Randomness,
        start: Sequence[Tensor] | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        """Start anew for `num_samples` samples: from `start`, or from values that add nothing until updated.

        `start` holds one sample's values, in the order of `tensors()`; gradients flow back to it. `dropout` is the
        share of a site's inputs that are zeroed inside `dropping`.
        """
        self.num_samples = num_samples
        if start is None:
            start = self.drawn(num_samples, randomness)
        self.replace([self._spread(tensor) for tensor in start])
        if dropout > 0:
            self._dropout = InputDropout(dropout, seed_tensor(num_samples, randomness, self.sites[0].device))

    def drawn(self, num_samples: int, randomness: Randomness) -> list[Tensor]:
        """Return the adapter's own start, in the order of `tensors()`."""
        starts = [self.adapter.start(site, num_samples, randomness, value_dtype(site)) for site in self.sites]
        return [tensor for start in starts for tensor in start]

    def _spread(self, tensor: Tensor) -> Tensor:
        """Give every sample the values of the only one there is."""
        if tensor.shape[-3] != self.num_samples:
            tensor = tensor.expand(*tensor.shape[:-3], self.num_samples, -1, -1)
        return tensor if tensor.requires_grad else tensor.requires_grad_()

    def erase(self) -> None:
        """Forget everything."""
        self.num_samples, self._values, self._dropout, self._some = 0, {}, None, None

    @contextmanager
    def dropping(self, update: int) -> Iterator[None]:
        """Apply the dropout inside the block, with the zeros of the write's `update`-th gradient step."""
        if self._dropout is None:
            yield
            return
        self._dropout.update, self._is_dropping = update, True
        try:
            yield
        finally:
            self._is_dropping = False

    def input_factors(self, path: str, count: int, x: Tensor, samples: slice = slice(None)) -> Tensor | None:
        """Return what the inputs of site `path` are multiplied by, [samples, count, width]; None: nothing."""
        if self._dropout is None or not self._is_dropping:
            return None
        return self._dropout.factors(path, count, x, self._rows_of_sample, samples)

    @contextmanager
    def of_samples(self, samples: Tensor) -> Iterator[None]:
        """Hold only the values of `samples` [n] inside the block; with one memory for all rows nothing changes.

        Raises ConfigError where no memory is open, inside another such block, and for samples that are not there.
        """
        self._check_open()
        if not isinstance(samples, Tensor) or samples.dim() != 1 or samples.dtype not in (torch.int64, torch.int32):
            raise ConfigError(f"rows must be int64 of shape [R], got {shortened(samples)}.")
        if self.num_samples == 1 and not self._is_part:
            yield
            return
        values, number, key = self._values, self.num_samples, tuple(samples.tolist())
        if self._is_part:
            raise ConfigError("some rows' memories are chosen already; leave that block before choosing others.")
        if not key or not all(0 <= sample < number for sample in key):
            raise ConfigError(
                f"the rows {list(key)} are not there: {number} memories are open, from 0 to {number - 1}."
            )
        if key == tuple(range(number)):
            yield
            return
        if self._some is None or self._some[0] != key:
            chosen = {
                path: tuple(tensor.index_select(-3, samples.to(tensor.device, non_blocking=True)) for tensor in tensors)
                for path, tensors in values.items()
            }
            # Decoding asks for the same rows many times in a row.
            self._some = key, chosen
        self._values, self.num_samples, self._is_part = self._some[1], len(key), True
        try:
            yield
        finally:
            self._values, self.num_samples, self._is_part = values, number, False

    @contextmanager
    def read_by(self, rows: Sequence[int], count: int) -> Iterator[None]:
        """Inside an open block: row rows[i] of `count` reads memory i, and the other rows read nothing.

        There may be more memories than `rows`; the last ones are then read by none. Gradients flow through.
        """
        self._check_open()
        wide = [tensor.new_zeros(*tensor.shape[:-3], count, *tensor.shape[-2:]) for tensor in self.tensors()]
        places = torch.tensor(rows, dtype=torch.int64).to(self.sites[0].device, non_blocking=True)
        read = [tensor.narrow(-3, 0, len(rows)) for tensor in self.tensors()]
        # Zeros add exactly nothing, whatever the adapter.
        spread = [zeros.index_copy(-3, places, own) for zeros, own in zip(wide, read, strict=True)]
        with self.holding(spread, (count, None)):
            self.is_spread = True
            try:
                yield
            finally:
                self.is_spread, self._some = False, None

    def tensors(self) -> list[Tensor]:
        """Return all values, site by site in the adapter's order."""
        return [tensor for site in self.sites for tensor in self._values[site.path]]

    def named(self) -> dict[str, Tensor]:
        """Return the values under `<site path>.<tensor name>`."""
        return dict(zip(self.names(), self.tensors(), strict=True))

    def names(self) -> list[str]:
        """Return `<site path>.<tensor name>` for every tensor, in the order of `tensors()`."""
        return [f"{site.path}.{name}" for site in self.sites for name in self.adapter.names]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Put new values in the place of all old ones, in the order of `tensors()`."""
        width = len(self.adapter.names)
        self._some = None
        for index, site in enumerate(self.sites):
            self._values[site.path] = tuple(tensors[index * width : (index + 1) * width])

    @contextmanager
    def opened(self, kind: str) -> Iterator[None]:
        """Hold the network for these values, which are forgotten at the end; the network does not read them yet.

        Raises ConfigError when a memory holds it already, this one or another. `kind` is for such messages.
        """
        with claimed(self.blocks[-1], kind) as self._block:
            try:
                yield
            finally:
                self._block = None
                self.erase()

    def check_thread(self) -> None:
        """Raise ConfigError if the values are open in another thread."""
        if self._block is not None:
            self._block.check_thread()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the network read these values inside the block, and not a moment longer."""
        with ExitStack() as stack:
            if self._block is None:
                block = stack.enter_context(claimed(self.blocks[-1], "read"))
                stack.callback(setattr, self, "_block", None)
                self._block = block
            stack.callback(self._detach)
            self._attachments = self._attach()
            yield

    def _detach(self) -> None:
        if self._attachments is not None:
            self._attachments.close()
        self._attachments = None

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside an open block: let the network read nothing for the length of this one, and hold it all the same.

        Whoever leaves it reads on, in whatever thread that is.
        """
        if self._attachments is None or self._block is None:
            raise ConfigError("no memory is open that could be set aside.")
        self.check_thread()
        self._detach()
        try:
            yield
        finally:
            self._block.take_over()
            self._attachments = self._attach()

    @contextmanager
    def holding(self, tensors: Sequence[Tensor], state: State) -> Iterator[None]:
        """Let the network read `tensors` inside the block, as in `state`, in the place of what these values were."""
        self.check_thread()
        with nullcontext() if self._attachments is not None else self.attached():
            before = self.state(), self._values
            (self.num_samples, self._dropout), self._values = state, {}
            self.replace(tensors)
            try:
                yield
            finally:
                (self.num_samples, self._dropout), self._values = before

    def _attach(self) -> ExitStack:
        """Put the values beside what the modules compute; closing the stack takes them away again."""
        handles = []
        with ExitStack() as stack:
            stack.enter_context(unrolled(self.network))
            changed: dict[nn.Module, Mapping[str, Any]] = bare_of(self.network)
            for block in self.blocks:
                handles.append(block.register_forward_pre_hook(self._check_rows, with_kwargs=True))
                stack.callback(handles[-1].remove)
                changed[block] = {}
            for module, sites in self._sites_by_module().items():
                changed[module] = {}
                if isinstance(module, Experts):
                    changed[module] = {"additions": module.additions}
                    stack.callback(setattr, module, "additions", module.additions)
                    module.additions = _ExpertReader(self, sites)
                else:
                    handles.append(module.register_forward_hook(self._hook(sites[0])))
                    stack.callback(handles[-1].remove)
            stack.enter_context(copied_bare(self.network, changed, {handle.id for handle in handles}))
            return stack.pop_all()

    def _check_rows(self, block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # Here, because experts see tokens, not rows.
        self.check_thread()
        hidden = arguments[0] if arguments else next(iter(keywords.values()), None)
        if isinstance(hidden, Tensor):
            check_rows(hidden.shape[0], self.num_samples)
            self._rows_of_sample = hidden.shape[0] // max(1, self.num_samples)

    def _check_open(self) -> None:
        if self._block is None:
            raise ConfigError("no memory is open; use this inside a `with memory.write(...)` block.")
        self.check_thread()

    def state(self) -> State:
        """Return what, beside the values, decides how they are read."""
        return self.num_samples, self._dropout

    def _sites_by_module(self) -> dict[nn.Module, list[Site]]:
        grouped: dict[nn.Module, list[Site]] = {}
        for site in self.sites:
            grouped.setdefault(site.module, []).append(site)
        return grouped

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
            self.check_thread()
            x = arguments[0]
            check_rows(x.shape[0], self.num_samples)
            x = x.reshape(self.num_samples, -1, x.shape[-1])
            factors = self.input_factors(site.path, x.shape[1], x)
            added = self.adapter.linear(x if factors is None else x * factors, self._values[site.path])
            return out + added.reshape(out.shape).to(out.dtype)

        return add

    def read(self, path: str) -> tuple[Tensor, ...]:
        """Return the current values of one site."""
        return self._values[path]


@final
class _ExpertReader(ExpertAdditions):
    """Adds the fast weights of one layer's experts, each (expert, sample) group its own."""

    def __init__(self, fast: FastWeights, sites: Sequence[Site]) -> None:
        self.fast, self.paths = fast, {site.projection: site.path for site in sites}

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        self.fast.check_thread()
        return self.fast.num_samples

    def add(self, projection: str, out: Tensor, x: Tensor, routing: Routing) -> Tensor:
        if projection not in self.paths:
            return out
        path, samples = self.paths[projection], routing.samples
        values = self.fast.read(path)
        if routing.num_samples < self.num_samples:
            values = tuple(tensor[:, samples] for tensor in values)
        factors = self.fast.input_factors(path, x.shape[0] // routing.num_samples, x, samples)
        if factors is not None:
            # Drawn in the order of the tokens, which does not depend on where the router sent the others.
            x = x * factors.flatten(0, 1)[routing.order]
        return out + self.fast.adapter.grouped(x, values, routing.ends).to(out.dtype)


def value_dtype(site: Site) -> torch.dtype:
    """Fast weights are float32 whatever the base is stored in, because bf16 loses small updates; float64 stays."""
    weight = next(site.module.parameters())
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
