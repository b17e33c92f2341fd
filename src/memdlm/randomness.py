"""Seeded draws. Nothing in the package touches the global random state.

A generator is an argument everywhere. Where a draw must not depend on who shares the batch (evaluation, serving),
callers pass a list of generators, one per row: each row then gets the numbers it would get alone.

A generator gives one seed per draw. The numbers follow from (seed, index) alone, by integer arithmetic on the device
that needs them. So a seed gives the same numbers on every device, and no numbers are copied or waited for.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from memdlm.errors import ConfigError

Randomness: TypeAlias = torch.Generator | Sequence[torch.Generator]
"""One generator for the whole batch, or one per row."""

STEP, FIRST, SECOND = (each - 2**64 for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers of 64 bits."""
MANTISSA = {torch.float32: 24, torch.float64: 53}
"""Random bits of a number, by dtype."""

PART = 2**16
"""Numbers that a CPU draws at once."""


def number_of(*keys: int | str) -> int:
    """Return a number of 56 bits that depends on all `keys`."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, keys)).encode()).digest()[:7], "little")


def derive(*keys: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on all `keys`, e.g. (seed, "noise", step, rank)."""
    return torch.Generator().manual_seed(number_of(*keys))


def on_the_host(generator: torch.Generator) -> torch.Generator:
    """Return `generator` if it is on the CPU, else a CPU generator seeded from it (waits for its device)."""
    if generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def offshoots(randomness: Randomness) -> Randomness:
    """Return a CPU generator for each one given, whose stream is another one; those given draw nothing.

    For draws of which others in the batch say how many there are: whatever is drawn afterwards does not depend on them.
    Waits for the device of generators that are not on the CPU.
    """
    if isinstance(randomness, torch.Generator):
        return _offshoot(randomness)
    return [_offshoot(each) for each in randomness]


def _offshoot(generator: torch.Generator) -> torch.Generator:
    # The generator itself will draw the same number next, so that it is no seed as it is.
    seed = torch.randint(2**62, (1,), generator=generator.clone_state(), device=generator.device)
    return derive("offshoot", int(seed))


def uniform(
    shape: Sequence[int],
    randomness: Randomness,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw U[0, 1) of `shape` on `device`; with one generator per row, row i comes from generator i alone.

    Such a row begins with the same numbers whatever its width. `dtype` is float32 or float64. Raises ConfigError when
    the generators do not match the rows.
    """
    if not isinstance(randomness, torch.Generator) and len(randomness) != shape[0]:
        raise ConfigError(f"generator: got {len(randomness)} generators for {shape[0]} rows; pass one, or one per row.")
    streams = 1 if isinstance(randomness, torch.Generator) else shape[0]
    return numbers(seed_tensor(streams, randomness, device), shape, dtype)


def seed_tensor(count: int, randomness: Randomness, device: torch.device | str) -> Tensor:
    """Draw `count` seeds, [count] int64 on `device`; with one generator per row, seed i comes from generator i alone.

    Does not wait for the device, unless several generators live on one.
    """
    if isinstance(randomness, torch.Generator):
        drawn = torch.randint(2**62, (count,), generator=randomness, device=randomness.device)
    else:
        drawn = torch.cat([torch.randint(2**62, (1,), generator=each, device=each.device) for each in randomness])
    return drawn.to(device, non_blocking=True)


def numbers(seed: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return U[0, 1) of `shape` on the device of `seed`: [1], or [shape[0]] with a stream for every row."""
    count = torch.Size(shape).numel() // max(1, seed.shape[0])
    # A part fits into a CPU's cache; a GPU takes everything at once.
    part = max(1, PART // max(1, seed.shape[0])) if seed.device.type == "cpu" else max(1, count)
    parts = [_part(seed, start, min(start + part, count), dtype) for start in range(0, count, part)]
    drawn = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) if parts else seed.new_empty(0, dtype=dtype)
    return drawn.reshape(tuple(shape))


def _part(seed: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    bits = MANTISSA[dtype]
    counters = torch.arange(start, stop, device=seed.device).mul_(STEP) + seed[:, None]
    return _shifted(_mixed(counters), 64 - bits).to(dtype).mul_(2.0**-bits)


def branched(seed: Tensor, place: Tensor | int) -> Tensor:
    """Return the seeds of other streams, [N]: one for every `seed` [N] and its `place` [N]."""
    # Not STEP, with which `numbers` counts: no branch may be a later part of the stream it starts from.
    return _mixed(seed + place * SECOND if isinstance(place, Tensor) else seed + _wrapped(place * SECOND))


def _wrapped(value: int) -> int:
    """Return an integer wrapped around to 64 signed bits."""
    return (value + 2**63) % 2**64 - 2**63


def _mixed(value: Tensor) -> Tensor:
    """Turn int64 counters into random bits with SplitMix64's output function; overwrites `value`."""
    value.bitwise_xor_(_shifted(value, 30)).mul_(FIRST)
    value.bitwise_xor_(_shifted(value, 27)).mul_(SECOND)
    return value.bitwise_xor_(_shifted(value, 31))


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift to the right, as if the numbers were unsigned."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)
