"""Prompts that a block-causal network has seen, kept between decodings: the states that no memory changes.

n tokens of finished blocks   F the first block with fast weights   H key heads   P head width   D model width
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.inference.views import Asked, FinishedBlocks, Pass
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.key_values import KeyValueCache
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.backbone import MaskedDiffusionLM
from memdlm.types import Ids, TextIds


@final
@dataclass(frozen=True, slots=True, eq=False)
class SeenPrompt:
    """What the blocks below F computed for a text."""

    ids: TextIds
    """[n] on the CPU."""
    block: int
    """Tokens that saw each other: the size of the pattern's blocks."""
    layers: list[tuple[Tensor, Tensor]]
    """Per block below F, keys and values [H, n, P]."""
    hidden: Tensor
    """[n, D], the input of block F."""

    @property
    def nbytes(self) -> int:
        """What the states take."""
        pairs = sum(each.nbytes for pair in self.layers for each in pair)
        return pairs + self.hidden.nbytes

    def shared_with(self, ids: TextIds, block: int) -> int:
        """Return how many tokens this text and `ids` [m], on the CPU, have in common at their beginning.

        With blocks of another size, the states are others.
        """
        if block != self.block:
            return 0
        length = min(self.ids.numel(), ids.numel())
        differs = (self.ids[:length] != ids[:length]).nonzero()
        return length if differs.numel() == 0 else int(differs[0])


@final
class PromptCache:
    """Lets calls of `generate` and `stream` continue from prompts that earlier calls have seen, with the same tokens.

        cache = PromptCache(model, memory)
        generate(model, tokenizer, prompts, memory=memory, prompt_cache=cache)
        generate(model, tokenizer, prompts, prompt_cache=cache)      # the blocks below the memory are not run again

    It holds the states of the blocks below the first fast weight of `memory`. These are the same with the memory, with
    another one of the same blocks, and without any. The blocks above run again on the prompt. Without a `memory` it
    holds all blocks, and no memory may be open while it is used. A beginning that two prompts have in common is shared,
    as in a conversation that grows. The cache is valid until the model's weights change. It keeps the `max_prompts`
    prompts that were used last, as far as they fit into `max_bytes` on the model's device (None: no limit).

    Raises ConfigError for networks that are not block-causal: there every new token changes the states of the prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: ParametricMemory | None = None,
        *,
        max_prompts: int = 8,
        max_bytes: int | None = None,
    ) -> None:
        network = unwrap(model)
        if not isinstance(network, MaskedDiffusionLM) or not network.model.is_cacheable:
            raise ConfigError(
                f"prompt_cache: {type(network).__name__} keeps no keys and values; leave prompt_cache out."
            )
        if max_prompts < 1:
            raise ConfigError(f"max_prompts must be at least 1, got {max_prompts}.")
        self.network = network
        self.first = len(network.model.layers) if memory is None else memory.first_block
        if self.first == 0:
            raise ConfigError(
                "prompt_cache: the memory changes every block (mem_inner_layer_fraction 1), so nothing of a prompt can "
                "be kept; leave prompt_cache out."
            )
        if max_bytes is not None and max_bytes < 0:
            raise ConfigError(f"max_bytes must be at least 0, got {max_bytes}.")
        self.max_prompts, self.max_bytes = max_prompts, max_bytes
        self._seen: list[SeenPrompt] = []

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def nbytes(self) -> int:
        """What the held states take on the device."""
        return sum(seen.nbytes for seen in self._seen)

    def lower(self, first: int) -> None:
        """Hold only blocks below `first` from now on, because a memory changes that one; what is held is dropped."""
        if first < self.first:
            self.first = first
            self.clear()

    def clear(self) -> None:
        """Drop all prompts, for example after the model was trained further."""
        self._seen.clear()

    def check(self, model: nn.Module, memory: ParametricMemory | None) -> None:
        """Raise ConfigError if the held states are not those that `model` computes while `memory` is open."""
        if unwrap(model) is not self.network:
            raise ConfigError("prompt_cache belongs to another model; make one for this: PromptCache(model, memory).")
        if memory is not None and memory.first_block < self.first:
            raise ConfigError(
                f"prompt_cache holds blocks 0 to {self.first - 1}, but the memory changes blocks from "
                f"{memory.first_block} on; make it for this memory: PromptCache(model, memory)."
            )

    def find(self, ids: TextIds, block: int) -> tuple[SeenPrompt, int] | None:
        """Return the prompt that begins most like `ids` [m], on the CPU, and the common tokens in whole blocks."""
        shared = [seen.shared_with(ids, block) // block * block for seen in self._seen]
        longest = max(shared, default=0)
        if longest == 0:
            return None
        seen = self._seen.pop(shared.index(longest))
        self._seen.append(seen)
        return seen, longest

    def restore(self, cache: KeyValueCache, row: int, seen: SeenPrompt, length: int) -> None:
        """Put the first `length` keys and values of `seen` into `cache`."""
        for layer, (key, value) in enumerate(seen.layers):
            for buffer, kept in zip(cache.of(layer, key[None]), (key, value), strict=True):
                buffer[row, :, :length] = kept[:, :length]

    def keep(self, ids: TextIds, block: int, cache: KeyValueCache, row: int, hidden: Sequence[Tensor]) -> None:
        """Keep the text `ids` [n], on the CPU, in blocks of `block` tokens; `hidden` are the pieces of [n, D]."""
        length = ids.numel()
        if any(seen.shared_with(ids, block) == length for seen in self._seen):
            return
        # Texts that this one continues are no longer needed.
        self._seen = [seen for seen in self._seen if seen.shared_with(ids, block) < seen.ids.numel()]
        layers = [cache.held(layer, row, length) for layer in range(self.first)]
        self._seen.append(SeenPrompt(ids.clone(), block, layers, torch.cat(list(hidden))))
        del self._seen[: -self.max_prompts]
        while self.max_bytes is not None and self._seen and self.nbytes > self.max_bytes:
            del self._seen[0]


@final
class Prefill:
    """The first pass over each row of one canvas: states that the cache holds are restored, new ones are kept in it."""

    def __init__(self, cache: PromptCache, view: FinishedBlocks) -> None:
        self.cache, self.view = cache, view
        self._is_new = torch.ones(view.cache.batch, dtype=torch.bool)
        self._found: dict[int, Tensor] = {}
        self.restored = torch.zeros(view.cache.batch, dtype=torch.int64)
        """[B] positions of every row's text that were restored."""

    def admit(self, row: int) -> None:
        """Begin anew in a row, which another text takes."""
        self._is_new[row], self.restored[row] = True, 0

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to `target`."""
        self._is_new[target], self.restored[target] = self._is_new[source], self.restored[source]

    def is_due(self, asked: Asked) -> bool:
        """Whether some of the asked rows have not been passed yet."""
        return bool(self._is_new[asked.rows].any())

    def restore(self, ids: Ids, asked: Asked) -> tuple[Tensor, Tensor, Pass] | None:
        """Restore known beginnings of rows below block F.

        Return their rows [R], their input of block F [R, W, D], and the pass over them that the blocks from F on still
        have to make; None if no beginning is known.
        """
        rows, states = [], []
        self._found.clear()
        for row, block, end in self._ends(asked):
            found = self.cache.find(ids[row, :end].cpu(), block) if self._is_new[row] else None
            if found is not None:
                seen, length = found
                self.cache.restore(self.view.cache, row, seen, length)
                self._found[row] = seen.hidden[:length]
                self.restored[row] = length
                rows.append(row)
                states.append(seen.hidden[:length])
        if not rows:
            return None
        lengths = torch.tensor([len(state) for state in states])
        self.view.skip(torch.tensor(rows), lengths)
        part = Pass(torch.zeros_like(lengths), lengths)
        return torch.tensor(rows), torch.nn.utils.rnn.pad_sequence(states, batch_first=True), part

    def keep(self, ids: Ids, asked: Asked, part: Pass, hidden: Tensor) -> None:
        """Keep the finished blocks of new rows; `hidden` [R, W, D] is what the pass handed to block F."""
        for index, ((row, block, end), first) in enumerate(zip(self._ends(asked), part.first.tolist(), strict=True)):
            if self._is_new[row] and end > first:
                before = [self._found[row]] if row in self._found else []
                pieces = [*before, hidden[index, : end - first]]
                self.cache.keep(ids[row, :end].cpu(), block, self.view.cache, row, pieces)
        self._is_new[asked.rows] = False
        self._found.clear()

    def _ends(self, asked: Asked) -> list[tuple[int, int, int]]:
        """Return, for every asked row, the row, its block size, and where its finished blocks end."""
        blocks = self.view.blocks[asked.rows]
        ends = asked.per_row("amin") // blocks * blocks
        return list(zip(asked.rows.tolist(), blocks.tolist(), ends.tolist(), strict=True))
