"""What the blocks below a boundary computed, kept per state; it does not depend on what changes above them.

A state is identified by its tensor of ids, together with the attention mask and pattern under which it was seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from memdlm.models.blocks.masks import AttentionPattern
from memdlm.types import Ids


@dataclass(frozen=True, slots=True)
class State:
    """A noised text as a network sees it."""

    ids: Ids
    attention_mask: Tensor | None
    pattern: AttentionPattern | None

    def is_same(self, other: "State") -> bool:
        """Whether both are the same tensors under the same pattern."""
        return self.ids is other.ids and self.attention_mask is other.attention_mask and self.pattern == other.pattern


class LowerLayers(ABC):
    """Where a call that starts at block `first` gets the hidden states from."""

    first: int

    @abstractmethod
    def hidden(self, state: State, lower: Callable[[], Tensor]) -> Tensor | None:
        """Return the input [B, L, D] of block `first`, or None to run the whole network; `lower` computes it."""


@final
class SharedLowerLayers(LowerLayers):
    """Computes each state's lower part once and hands it out as a constant.

    The lower part of `anchor`, or with `is_traced` that of every state, keeps its graph. `ConnectedLowerLayers` and
    `of` return it with that graph.
    """

    def __init__(self, first: int, *, anchor: Ids | None = None, is_traced: bool = False) -> None:
        self.first, self._anchor, self._is_traced = first, anchor, is_traced
        self._known: list[tuple[State, Tensor]] = []

    def hidden(self, state: State, lower: Callable[[], Tensor]) -> Tensor:
        """Return the detached hidden states of `state`."""
        found = self.known(state)
        if found is None:
            with torch.set_grad_enabled(self.is_connected(state)):
                found = lower()
            self._known.append((state, found))
        return found.detach()

    def known(self, state: State) -> Tensor | None:
        """Return what was computed for `state`, with its graph if it has one."""
        return next((hidden for other, hidden in self._known if other.is_same(state)), None)

    def of(self, ids: Ids) -> Tensor | None:
        """Return what was computed for the text `ids`, with its graph if it has one."""
        return next((hidden for state, hidden in self._known if state.ids is ids), None)

    def is_connected(self, state: State) -> bool:
        """Whether gradients flow through what is kept for `state`."""
        return self._is_traced or state.ids is self._anchor

    def connected(self) -> "ConnectedLowerLayers":
        """Return the view through which an outer loss continues from here."""
        return ConnectedLowerLayers(self)

    def retain(self, ids: Ids | None) -> None:
        """Drop every state but the one of `ids`."""
        self._known = [(state, hidden) for state, hidden in self._known if state.ids is ids]


@final
class ConnectedLowerLayers(LowerLayers):
    """Hands out what a `SharedLowerLayers` holds, but only where that loses no gradient."""

    def __init__(self, shared: SharedLowerLayers) -> None:
        self.first, self._shared = shared.first, shared

    def hidden(self, state: State, lower: Callable[[], Tensor]) -> Tensor | None:
        """Return the hidden states with their graph, or None."""
        if torch.is_grad_enabled() and not self._shared.is_connected(state):
            return None
        return self._shared.known(state)


@final
class GivenLowerLayers(LowerLayers):
    """Hands out `hidden` [B, L, D] for the text `ids`, and nothing for any other."""

    def __init__(self, first: int, ids: Ids, hidden: Tensor) -> None:
        self.first, self._ids, self._hidden = first, ids, hidden

    def hidden(self, state: State, lower: Callable[[], Tensor]) -> Tensor | None:
        """Return the given hidden states, or None."""
        return self._hidden if state.ids is self._ids else None
