"""A write into memory at the true shapes of LLaDA-MoE and LLaDA2.x: seconds, peak memory, share of the matrix peak.

    python benchmarks/gpu/writes.py

The memory is the paper's, one per row; weights are random, in bfloat16. The peak is that of square bfloat16 products,
measured in the same process; fast weights are float32, and their products count against the same peak.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from card import Card, Row, arguments, card_of, run_part, spread
from counting import flops
from peaks import best_product
from shapes import MASK, Shelf, ids_of
from torch import nn

from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive

FAMILIES = ("lladamoe", "llada2")
SIZES = ((1, 512), (1, 2048), (4, 2048), (1, 8192))
"""(rows, tokens of each)."""
WANTED = 0.6
"""Share of the peak below which `make gpu PART=profile` asks what bounds a write."""


def write_of(model: nn.Module, rows: int, length: int) -> Callable[[], None]:
    """Return a call that writes `rows` texts of `length` tokens, and forgets them."""
    memory = ParametricMemory(model, MemoryConfig.paper(per_sample=True), mask_token_id=MASK)
    ids = ids_of(model, rows, length)

    def write() -> None:
        with memory.write(ids, generator=[derive("row", row) for row in range(rows)]):
            pass

    return write


def measured(card: Card, shelf: Shelf, peak: Callable[[], float], family: str, rows: int, length: int) -> Row:
    found = shelf.of(family)
    write = write_of(found.model, rows, length)
    seconds = spread(card.in_turns({"write": write}, 5)["write"])
    flop = flops(write)
    rate = flop / seconds["median_s"]
    return {
        "family": family,
        "rows": rows,
        "length": length,
        **found.about(),
        **seconds,
        "flop": flop,
        "flop_per_s": rate,
        "peak_flop_per_s": peak(),
        "share_of_peak": rate / peak(),
        "tokens_per_s": rows * length / seconds["median_s"],
        "peak_bytes": card.peak_bytes(write),
    }


def jobs_of(card: Card) -> dict[str, Callable[[], Row]]:
    shelf = Shelf(card, {})
    known: list[float] = []

    def peak() -> float:
        if not known:
            known.append(best_product(card))
        return known[0]

    sizes: Any = ((1, 32), (2, 32)) if card.is_quick else SIZES
    return {
        f"{family} {rows} x {length}": partial(measured, card, shelf, peak, family, rows, length)
        for family in FAMILIES
        for rows, length in sizes
    }


def main() -> int:
    options = arguments("writes", __doc__, budget=360)
    return run_part("writes", jobs_of(card_of(options)), options, {"wanted_share_of_peak": WANTED})


if __name__ == "__main__":
    raise SystemExit(main())
