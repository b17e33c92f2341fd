"""Fused experts against the published style, a Python loop over all experts, on the same weights and tokens.

    python benchmarks/experts.py [--tokens 256] [--rounds 5] [--json]

64 experts, 8 per token, on the CPU in one thread. Both ways run alternately in this process; the ratio of the medians
is what counts, times depend on the machine. Exits 1 if the fused way is not at least 3 times faster.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm.models.experts import Experts
from memdlm.models.layers import GatedMLP

NUM_EXPERTS, CHOSEN = 64, 8


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
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way; the ways take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, run in ways.items():
            seconds = timed(run)
            if index:
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    g, dtype = torch.Generator().manual_seed(0), getattr(torch, options.dtype)
    fused = Experts(NUM_EXPERTS, options.hidden, options.width)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    fused = fused.to(dtype)
    loop = modules_of(fused).to(dtype)
    x = torch.randn(options.tokens, options.hidden, generator=g).to(dtype).requires_grad_()
    scores = torch.randn(options.tokens, NUM_EXPERTS, generator=g).softmax(-1)
    weight, expert = (each.contiguous() for each in scores.topk(CHOSEN, dim=-1))
    weight = weight.to(dtype)

    ways = {
        "fused": lambda: fused(x, expert, weight),
        "loop": lambda: published_loop(loop, x, expert, weight),
    }
    with torch.no_grad():
        difference = (ways["fused"]() - ways["loop"]()).abs().max().item()
        forward = measure(ways, options.rounds)
    both = measure({name: lambda run=run: run().sum().backward() for name, run in ways.items()}, options.rounds)
    report = {
        "tokens": options.tokens,
        "hidden": options.hidden,
        "width": options.width,
        "dtype": options.dtype,
        "largest difference": difference,
        "forward": {**forward, "ratio": forward["loop"] / forward["fused"]},
        "forward and backward": {**both, "ratio": both["loop"] / both["fused"]},
    }
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{NUM_EXPERTS} experts, top {CHOSEN}, {options.tokens} tokens, hidden {options.hidden}, "
              f"expert width {options.width}, {options.dtype}; outputs differ by at most {difference:.1e}")
        for kind in ("forward", "forward and backward"):
            row = report[kind]
            print(f"{kind:22} fused {row['fused'] * 1e3:8.2f} ms   loop {row['loop'] * 1e3:8.2f} ms   "
                  f"ratio {row['ratio']:.1f}")
    return 0 if min(report[kind]["ratio"] for kind in ("forward", "forward and backward")) >= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
