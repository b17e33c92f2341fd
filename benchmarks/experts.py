"""Fused experts against the published style, a Python loop over all experts, on the same weights and tokens.

    python benchmarks/experts.py [--rounds 15] [--dtype float32] [--json]
    python benchmarks/experts.py --packed [--rounds 15] [--out benchmarks/results/experts_packed.json]

64 experts, 8 per token, on the CPU in one thread. Both ways take turns in this process; the ratio of the medians is
what counts, times (of the CPU, so that other programs do not count) depend on the machine. What is saved is the cost
of starting 64 small products and finding their tokens; the arithmetic is the same. So the gain is large where little
work falls on an expert (a decoding step, a small model: the first size, for which this exits 1 below a ratio of 3),
and shrinks where products are large. On a GPU the loop also waits for the device once per expert, which a CPU cannot
show.

`--packed` measures 4-bit experts instead: one projection (width x width), rows = tokens x 8, the experts drawn evenly.
`all` unpacks all experts for the product, `now` is what the package does (only those of the rows, where these are at
most half as many as the experts), `unpacked` multiplies with weights that are kept unpacked: the floor, at four to
eight times the memory. Where `now` does what `all` does their ratio shows the noise.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm.models import bnb_layers
from memdlm.models.experts import Experts, grouped_linear
from memdlm.models.layers import GatedMLP

NUM_EXPERTS, CHOSEN = 64, 8
SIZES = ((64, 64, 32), (128, 128, 64), (32, 256, 128), (256, 256, 128))
"""(tokens, hidden width, expert width)."""
WANTED = 3.0
PACKED = (
    *((64, tokens, 256) for tokens in (1, 2, 4, 7, 8, 64, 512)),
    *((256, tokens, 128) for tokens in (1, 4, 16, 24, 31, 32, 512)),
)
"""(experts, tokens, width of one projection)."""


def published_loop(experts: nn.ModuleList, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """One expert after the other: find its tokens, run them, add the weighted results to the output."""
    out = torch.zeros_like(x)
    chosen = F.one_hot(expert, NUM_EXPERTS).permute(2, 1, 0)
    for index, module in enumerate(experts):
        rank, token = torch.where(chosen[index])
        out.index_add_(0, token, module(x[token]) * weight[token, rank, None])
    return out


def modules_of(fused: Experts) -> nn.ModuleList:
    """Return the same experts as one module each."""
    modules = nn.ModuleList(GatedMLP(fused.hidden_size, fused.intermediate_size) for _ in range(NUM_EXPERTS))
    with torch.no_grad():
        for index, module in enumerate(modules):
            gate, up = fused.gate_up_proj[index].chunk(2)
            module.gate_proj.weight.copy_(gate)
            module.up_proj.weight.copy_(up)
            module.down_proj.weight.copy_(fused.down_proj[index])
    return modules


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way; the ways take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, run in ways.items():
            seconds = timed(run)
            if index:
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def compare(tokens: int, hidden: int, width: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of both ways, forward and forward plus backward, and their ratios."""
    g = torch.Generator().manual_seed(0)
    fused = Experts(NUM_EXPERTS, hidden, width)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    fused = fused.to(dtype)
    loop = modules_of(fused).to(dtype)
    x = torch.randn(tokens, hidden, generator=g).to(dtype).requires_grad_()
    weight, expert = torch.randn(tokens, NUM_EXPERTS, generator=g).softmax(-1).topk(CHOSEN, dim=-1)
    weight = weight.to(dtype)
    ways = {
        "fused": lambda: fused(x, expert, weight),
        "loop": lambda: published_loop(loop, x, expert, weight),
    }
    with torch.no_grad():
        torch.testing.assert_close(ways["fused"](), ways["loop"](), rtol=2e-2, atol=2e-2)
        forward = measure(ways, rounds)
    both = measure({name: lambda run=run: run().sum().backward() for name, run in ways.items()}, rounds)
    row = {"tokens": tokens, "hidden": hidden, "width": width}
    for kind, times in (("forward", forward), ("forward_backward", both)):
        row |= {f"{kind}_{name}_ms": seconds * 1e3 for name, seconds in times.items()}
        row[f"{kind}_ratio"] = times["loop"] / times["fused"]
    return row


def compare_packed(experts: int, tokens: int, width: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of the three ways, forward and with the gradient of the input, and ratios."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, width, width, generator=g) * 0.05
    stack = bnb_layers.Stacked4bit(bnb_layers.quantise(weight, nn.Module()))
    plain = stack.unpacked()
    rows = tokens * CHOSEN
    chosen = torch.rand(tokens, experts, generator=g).topk(CHOSEN).indices.flatten()
    ends = torch.bincount(chosen, minlength=experts).cumsum(0).int()
    x = torch.randn(rows, width, generator=g).requires_grad_()
    ways = {
        "all": lambda: bnb_layers._Product.apply(x, ends, None, stack, False),
        "now": lambda: stack.product(x, ends),
        "unpacked": lambda: grouped_linear(x, plain, ends),
    }
    with torch.no_grad():
        torch.testing.assert_close(ways["now"](), ways["all"](), rtol=1e-4, atol=1e-4)
        forward = measure(ways, rounds)
    both = measure({n: lambda run=run: torch.autograd.grad(run().square().sum(), x) for n, run in ways.items()}, rounds)
    row = {"experts": experts, "tokens": tokens, "rows": rows, "width": width}
    for kind, times in (("forward", forward), ("forward_backward", both)):
        row |= {f"{kind}_{name}_ms": seconds * 1e3 for name, seconds in times.items()}
        row[f"{kind}_now_over_all"] = times["now"] / times["all"]
        row[f"{kind}_all_over_unpacked"] = times["all"] / times["unpacked"]
    return row


def packed(rounds: int, out: Path | None) -> int:
    rows = [compare_packed(*size, rounds) for size in PACKED]
    for row in rows:
        print(json.dumps({name: round(value, 3) for name, value in row.items()}))
    if out is not None:
        facts = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
        out.write_text(json.dumps({**facts, "threads": 1, "rows": rows}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.packed:
        return packed(options.rounds, options.out)
    rows = [compare(*size, getattr(torch, options.dtype), options.rounds) for size in SIZES]
    if options.json:
        print(json.dumps(rows))
    else:
        print(f"{NUM_EXPERTS} experts, top {CHOSEN}, {options.dtype}, one thread; ms, and how many times faster")
        for row in rows:
            print(
                "tokens {tokens:4} hidden {hidden:4} width {width:4} | forward: fused {forward_fused_ms:7.2f} loop "
                "{forward_loop_ms:7.2f} x{forward_ratio:.1f} | and backward: fused {forward_backward_fused_ms:7.2f} "
                "loop {forward_backward_loop_ms:7.2f} x{forward_backward_ratio:.1f}".format(**row)
            )
    return 0 if min(rows[0]["forward_ratio"], rows[0]["forward_backward_ratio"]) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
