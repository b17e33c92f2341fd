"""Saved memories put together, made smaller, or folded into weights: arithmetic on low-rank pairs.

scale * B A is what a memory adds to a module; every operation keeps the scale, so that the results are read like what
they were made of. What a combination does to the answers is not promised here: `memdlm.evaluation.interference`
measures it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm.errors import ConfigError, MemoryFileError
from memdlm.memory.fast_weights import FastWeights, value_dtype
from memdlm.memory.files.packing import Pair, Pairs, layers_of
from memdlm.memory.files.saved import SavedMemory
from memdlm.memory.sites import Site
from memdlm.models.blocks.experts import Experts
from memdlm.models.blocks.looped import check_not_looped
from memdlm.options import shortened
from memdlm.strict_json import is_number, is_whole


def concatenate(
    memories: Sequence[SavedMemory], weights: Sequence[float] | None = None, *, start: SavedMemory | None = None
) -> SavedMemory:
    """Return one memory that adds the weighted sum (default: every weight 1) of what `memories` add.

    Ranks are put side by side, so the sum is exact, and the new rank is the sum of the ranks. Memories that were
    written from a learned start all contain it: pass it as `start` (`ParametricMemory.unwritten`), and the result is
    the start plus the weighted sum of what was written on top.

    Raises MemoryFileError when the memories were written for different models or with different options of reading,
    ConfigError for a list that is empty or of another length than `weights`, and for memories with a learned start
    that would be counted more or less than once.
    """
    _check_kinds(memories, weights, start)
    memories = list(memories)
    weights = [1.0] * len(memories) if weights is None else [float(weight) for weight in weights]
    if not memories or len(weights) != len(memories):
        raise ConfigError(f"there are {len(memories)} memories and {len(weights)} weights; give one weight each.")
    _check_alike([*memories, *([] if start is None else [start])])
    surplus = sum(weights) - 1
    has_start = memories[0].fingerprint.learned is not None
    if has_start and start is None and abs(surplus) > 1e-9:
        raise ConfigError(
            f"these memories begin at a learned start, which their sum would count {sum(weights):g} times. Pass "
            "start=memory.unwritten(), or weights that sum to 1 (an average)."
        )
    if start is not None and not has_start:
        raise ConfigError("start has no effect: these memories were not written from a learned start.")
    parts = list(zip(memories, weights, strict=True))
    if start is not None and abs(surplus) > 1e-9:
        parts.append((start, -surplus))
    rank = sum(part.rank for part, _ in parts)
    modules = {module: None for part, _ in parts for module in part.pairs}
    pairs = {module: _side_by_side(module, parts) for module in modules}
    sources = [{"weight": weight, **memory.provenance} for memory, weight in zip(memories, weights, strict=True)]
    return _made_of(
        memories[0],
        rank,
        pairs,
        targets=tuple(sorted({target for part, _ in parts for target in part.targets})),
        provenance={
            "tokens": sum(int(memory.provenance.get("tokens", 0)) for memory in memories),
            "combined": sources,
        },
    )


def average(memories: Sequence[SavedMemory]) -> SavedMemory:
    """Return one memory that adds the mean of what `memories` add; see `concatenate`."""
    _check_kinds(memories, None, None)
    return concatenate(memories, [1 / max(1, len(memories))] * len(memories))


@torch.no_grad()
def compress(memory: SavedMemory, rank: int) -> SavedMemory:
    """Return the closest memory of a lower `rank` (truncated singular value decomposition, per module).

    The provenance has the error as `compression`: the share of the Frobenius norm over all modules that was lost, and
    that of the module which lost most. Raises ConfigError unless 1 <= rank < the memory's.
    """
    _check_kinds([memory], None, None)
    if not is_whole(rank, 1, memory.rank - 1):
        raise ConfigError(
            f"rank must be from 1 to {memory.rank - 1}, one less than the memory's, got {shortened(rank)}."
        )
    pairs: Pairs = {}
    lost, whole, worst = 0.0, 0.0, 0.0
    for module, pair in memory.pairs.items():
        pairs[module], values = _truncated(pair, rank)
        squares = values.square()
        lost, whole = lost + float(squares[rank:].sum()), whole + float(squares.sum())
        worst = max(worst, float((squares[rank:].sum() / squares.sum().clamp_min(1e-300)).sqrt()))
    error = {
        "from_rank": memory.rank,
        "relative_error": (lost / whole) ** 0.5 if whole else 0.0,
        "worst_module": worst,
    }
    return _made_of(memory, rank, pairs, memory.targets, {**memory.provenance, "compression": error})


@torch.no_grad()
def fold(memory: SavedMemory, fast: FastWeights) -> None:
    """Add what `memory` adds to the weights of the network of `fast`; sums are taken in float32 or wider, rounded once.

    It must have been checked that the memory was written for this network. Raises ConfigError for a network that runs
    its blocks several times.
    """
    check_not_looped(memory.fingerprint.options, "a memory is not folded into the weights")
    for site, layer in zip(fast.sites, layers_of(fast), strict=True):
        for number, module in enumerate(layer.modules()):
            pair = memory.pairs.get(module)
            if pair is None:
                continue
            weight = _weight(site, number)
            delta = (pair["B"].to(value_dtype(site)) @ pair["A"].to(value_dtype(site)) * memory.scale).to(weight.device)
            weight.copy_(weight.to(delta.dtype) + delta)


def _weight(site: Site, expert: int) -> Tensor:
    """Return the weight [out, in] of a site; of stacked experts, that of one."""
    if isinstance(site.module, Experts) and site.projection is not None:
        return site.module.weight_of(site.projection, expert)
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    return weight


def _made_of(
    memory: SavedMemory, rank: int, pairs: Pairs, targets: tuple[str, ...], provenance: dict[str, Any]
) -> SavedMemory:
    return dataclasses.replace(memory, rank=rank, pairs=pairs, targets=targets, provenance=provenance)


def _check_kinds(memories: Any, weights: Any, start: Any) -> None:
    """Raise ConfigError for what is no memory, and for weights that are no finite numbers."""
    is_list = isinstance(memories, Sequence) and all(isinstance(each, SavedMemory) for each in memories)
    if not is_list or not isinstance(start, (SavedMemory, type(None))):
        raise ConfigError("memories must be a list of SavedMemory (ParametricMemory.export or read_memory give one).")
    if weights is not None and not (isinstance(weights, Sequence) and all(is_number(each) for each in weights)):
        raise ConfigError(f"weights must be a list of finite numbers, one per memory, got {shortened(weights)}.")


def _check_alike(memories: Sequence[SavedMemory]) -> None:
    first = memories[0]
    for other in memories[1:]:
        reason = first.fingerprint.mismatch(other.fingerprint)
        if reason is None and (first.fingerprint.learned is None) != (other.fingerprint.learned is None):
            reason = "only one of them was written from a learned start"
        if reason is None and (first.layers, first.scale) != (other.layers, other.scale):
            reason = "they adapt different projections, or with different alpha / rank"
        if reason is None and first.config.inner_adapter_type != other.config.inner_adapter_type:
            reason = "they have different mem_inner_adapter_type"
        if reason is not None:
            raise MemoryFileError(f"memories cannot be combined: of the first, {reason}.")


def _side_by_side(module: str, parts: Sequence[tuple[SavedMemory, float]]) -> Pair:
    """Return [A1; A2; ...] and [w1 B1, w2 B2, ...]; a part without the module is zeros of its rank."""
    like = next(part.pairs[module] for part, _ in parts if module in part.pairs)
    wide, narrow = like["A"].shape[1], like["B"].shape[0]
    a, b = [], []
    for part, weight in parts:
        pair = part.pairs.get(module)
        a.append(like["A"].new_zeros(part.rank, wide) if pair is None else pair["A"])
        b.append(like["B"].new_zeros(narrow, part.rank) if pair is None else pair["B"] * weight)
    return {"A": torch.cat(a, 0).contiguous(), "B": torch.cat(b, 1).contiguous()}


def _truncated(pair: Pair, rank: int) -> tuple[Pair, Tensor]:
    """Return the best pair of a lower rank, and all singular values of B A in float64, the largest first."""
    dtype = pair["A"].dtype
    left, upper = torch.linalg.qr(pair["B"].double())
    right, lower = torch.linalg.qr(pair["A"].double().T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    size = min(rank, len(values))
    root = values[:size].sqrt()
    a = pair["A"].new_zeros(rank, pair["A"].shape[1])
    b = pair["B"].new_zeros(pair["B"].shape[0], rank)
    a[:size] = (root[:, None] * (v[:size] @ right.T)).to(dtype)
    b[:, :size] = ((left @ u[:, :size]) * root).to(dtype)
    return {"A": a, "B": b}, values
