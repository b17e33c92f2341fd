"""Seeded draws. Nothing in the package touches the global random state.

A generator is an argument everywhere. Where a draw must not depend on who shares the batch (evaluation, serving),
callers pass a list of generators, one per row: each row then gets the numbers it would get alone.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from memdlm.errors import ConfigError

Randomness: TypeAlias = torch.Generator | Sequence[torch.Generator]
"""One generator for the whole batch, or one per row."""


def derive(*keys: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on all `keys`, e.g. (seed, "noise", step, rank)."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def uniform(shape: Sequence[int], randomness: Randomness, device: torch.device | str = "cpu") -> Tensor:
    """Draw float32 U[0, 1) of `shape`; with one generator per row, row i comes from generator i alone.

    Numbers are drawn on each generator's own device and moved, so a CPU generator gives the same result
    whatever the model runs on. Raises ConfigError when the generators do not match the rows.
    """
    if isinstance(randomness, torch.Generator):
        return torch.rand(tuple(shape), generator=randomness, device=randomness.device).to(device)
    if len(randomness) != shape[0]:
        raise ConfigError(f"generator: got {len(randomness)} generators for {shape[0]} rows; pass one, or one per row.")
    return torch.stack([torch.rand(tuple(shape[1:]), generator=_branch(each)).to(device) for each in randomness])


def _branch(generator: torch.Generator) -> torch.Generator:
    """Return a CPU generator seeded by one number of `generator`: a row padded to the batch's length draws more
    numbers than alone, and must not be further along its stream for it."""
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def seeds(count: int, randomness: Randomness) -> list[int]:
    """Draw `count` seeds; with one generator per row, seed i comes from generator i alone. Waits for the device."""
    if isinstance(randomness, torch.Generator):
        return torch.randint(2**62, (count,), generator=randomness, device=randomness.device).tolist()
    return [int(torch.randint(2**62, (1,), generator=each, device=each.device)) for each in randomness]
