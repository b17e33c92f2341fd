"""What it costs to differentiate an outer loss through a write: exact, its upper part, and first order, in one run.

    python benchmarks/outer_gradient.py [--repetitions 3] [--out benchmarks/results/outer_gradient.json]

Mixture of experts (27 M parameters, float32, random weights), one thread; a prompt of 384 tokens is written over two
strided views into the last of eight blocks, 128 more are scored, two texts at a time. Seconds are process CPU time (the
machine may be shared), medians over interleaved repetitions. Peak memory is the growth of a fresh process's resident
set during its first step.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peak import resident_mb

from memdlm.diffusion import Corrupted, Linear, normalise
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LLaDAMoEConfig, build_model
from memdlm.training import Batch, score

MASK, PROMPT, LENGTH = 8191, 384, 512


def network(**changes: int) -> torch.nn.Module:
    config = LLaDAMoEConfig(
        vocab_size=8192,
        hidden_size=256,
        expert_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        **changes,
    )
    return build_model(config, seed=0).eval()


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 8000, (2, LENGTH), generator=draw)
    is_maskable = torch.arange(LENGTH).expand(2, -1) >= PROMPT
    is_masked = is_maskable & (torch.rand(clean.shape, generator=draw) < 0.5)
    return Batch(
        clean=clean,
        labels=clean.masked_fill(~is_maskable, -100),
        attention_mask=None,
        is_padding=None,
        is_maskable=is_maskable,
        noised=Corrupted(clean.masked_fill(is_masked, MASK), is_masked, torch.tensor([0.5, 0.5])),
    )


def step_of(model: torch.nn.Module, name: str) -> Callable[[], None]:
    """One outer step, without optimizer: `mdlm`, or `<order> K=<steps>`."""
    given = batch()

    def backward() -> None:
        lost = score(model, given, schedule=Linear(), weighting="scheduler")
        normalise(lost.sums, lost.counts, "token").squeeze().backward()
        model.zero_grad()

    if name == "mdlm":
        return backward
    order, steps = name.split(" K=")
    config = MemoryConfig.recall(outer_gradient=order, num_inner_steps=int(steps), strides=2)
    memory = ParametricMemory(model, config, mask_token_id=MASK)

    def with_memory() -> None:
        with memory.write(given.clean[:, :PROMPT], generator=torch.Generator().manual_seed(1)):
            backward()
        memory.learned.zero_grad()

    return with_memory


NAMES = ("mdlm", "first_order K=1", "exact_top K=1", "exact K=1", "first_order K=2", "exact K=2")


def seconds(repetitions: int) -> dict[str, float]:
    model = network()
    steps = {name: step_of(model, name) for name in NAMES}
    spent: dict[str, list[float]] = {name: [] for name in NAMES}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repetition:
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in spent.items()}


def peak(name: str) -> float:
    """MB by which the resident set of this process grows while `name` runs."""
    model = network()
    # Gradients are there before the measurement.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = step_of(model, name)
    before = resident_mb("VmRSS", reset=True)
    step()
    return resident_mb("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/outer_gradient.json"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak(arguments.peak))
        return
    found = seconds(arguments.repetitions)
    own = [sys.executable, __file__, "--peak"]
    peaks = {name: float(subprocess.run([*own, name], check=True, capture_output=True).stdout) for name in NAMES}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cpu_seconds": found,
        "peak_mb": peaks,
        "time_over_mdlm": {name: found[name] / found["mdlm"] for name in NAMES},
        "time_over_first_order": {f"exact K={k}": found[f"exact K={k}"] / found[f"first_order K={k}"] for k in (1, 2)},
        "memory_over_first_order": {
            f"exact K={k}": peaks[f"exact K={k}"] / peaks[f"first_order K={k}"] for k in (1, 2)
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in NAMES:
        print(f"{name:16} {found[name]:7.2f} CPU s  {peaks[name]:7.0f} MB  x{found[name] / found['mdlm']:.2f}")


if __name__ == "__main__":
    main()
