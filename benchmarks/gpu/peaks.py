"""The most that this card gives to matrix products and copies: what other parts are compared with.

python benchmarks/gpu/peaks.py
"""

import torch
from card import Card, Row, arguments, card_of, run_part, spread
from torch.nn import functional as F

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


def product(card: Card, name: str, size: int) -> Row:
    """Square matrix products; `tf32` is float32 with the faster, less exact products allowed."""
    g = torch.Generator(card.device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=g, device=card.device).to(DTYPES[name]) for _ in range(2))
    each = max(1, min(20, int(2e13 / size**3)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        seconds = [s / each for s in card.in_turns({"product": lambda: [a @ b for _ in range(each)]}, 5)["product"]]
    finally:
        torch.set_float32_matmul_precision(before)
    return {"size": size, "flop": 2 * size**3, **spread(seconds), "flop_per_s": 2 * size**3 / min(seconds)}


def grouped(card: Card, experts: int, tokens: int, width: int, out: int) -> Row:
    """One grouped product in bfloat16, every expert with its even share of the tokens."""
    g = torch.Generator(card.device).manual_seed(0)
    x = torch.randn(tokens, width, generator=g, device=card.device).bfloat16()
    weight = torch.randn(experts, out, width, generator=g, device=card.device).bfloat16()
    ends = (torch.arange(1, experts + 1, device=card.device) * (tokens // experts)).to(torch.int32)
    call = lambda: F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    seconds = card.in_turns({"grouped": call}, 10)["grouped"]
    flop = 2 * tokens * width * out
    return {"experts": experts, "tokens": tokens, "flop": flop, **spread(seconds), "flop_per_s": flop / min(seconds)}


def copy(card: Card, name: str, count: int) -> Row:
    """Copy a tensor on the device; bytes are counted once read and once written."""
    source = torch.zeros(count, dtype=DTYPES[name], device=card.device)
    target = torch.empty_like(source)
    seconds = card.in_turns({"copy": lambda: target.copy_(source)}, 10)["copy"]
    moved = 2 * source.numel() * source.element_size()
    return {"bytes": moved, **spread(seconds), "bytes_per_s": moved / min(seconds)}


def best_product(card: Card, name: str = "bfloat16") -> float:
    """Return the largest rate of a matrix product over a few sizes, in operations per second."""
    return max(product(card, name, size)["flop_per_s"] for size in sizes_of(card))


def sizes_of(card: Card) -> tuple[int, ...]:
    return (64, 128) if card.is_quick else (4096, 8192, 16384)


def main() -> int:
    options = arguments("peaks", __doc__, budget=90)
    card = card_of(options)
    jobs = {
        f"{name} product {size}": lambda name=name, size=size: product(card, name, size)
        for name in DTYPES
        for size in sizes_of(card)
    }
    for experts, width, out in ((4, 32, 64),) if card.is_quick else ((64, 2048, 2048), (256, 2048, 1024)):
        for tokens in (64,) if card.is_quick else (4096, 32768):
            jobs[f"grouped product {experts} experts {tokens} rows"] = lambda e=experts, t=tokens, w=width, o=out: (
                grouped(card, e, t, w, o)
            )
    for name in ("bfloat16", "float32"):
        count = 2**12 if card.is_quick else 2**30
        jobs[f"{name} copy"] = lambda name=name, count=count: copy(card, name, count)
    return run_part("peaks", jobs, options)


if __name__ == "__main__":
    raise SystemExit(main())
