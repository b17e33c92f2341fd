"""Peak memory and time of writing a text in chunks, from one window to sixteen, beside writing it in one piece.

    python benchmarks/streaming.py [--window 512] [--times 1 2 4 8 16] [--runs 3] [--out FILE]

Mixture of experts (27 M parameters, float32, random weights), one thread. Peak memory is the growth of a fresh
process's resident set during the write; seconds are process CPU time of that one write; medians over processes.
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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from outer_gradient import MASK, network
from peak import resident_mb

from memdlm.memory import MemoryConfig, ParametricMemory

WAYS = {
    "chunks, one after the other": "sequential",
    "chunks, accumulated": "accumulated",
    "one piece": None,
}
"""How a text is written, and the update of its chunks."""


def measure(length: int, window: int, way: str) -> dict[str, float]:
    """Write `length` tokens in this process."""
    model = network(max_position_embeddings=65536).requires_grad_(False)
    update = WAYS[way]
    config = MemoryConfig() if update is None else MemoryConfig(chunk_length=window, chunk_update=update)
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    ids = torch.randint(0, 8000, (1, length), generator=torch.Generator().manual_seed(0))
    before, start = resident_mb("VmRSS", reset=True), time.process_time()
    with memory.write(ids, generator=torch.Generator().manual_seed(1)):
        return {"cpu_seconds": time.process_time() - start, "peak_mb": resident_mb("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        length, way = arguments.child
        print(json.dumps(measure(int(length), arguments.window, way)))
        return
    rows = []
    for times in arguments.times:
        for way in WAYS:
            length = times * arguments.window
            child = ["--window", str(arguments.window), "--child", str(length), way]
            runs = [
                json.loads(subprocess.run([sys.executable, __file__, *child], check=True, capture_output=True).stdout)
                for _ in range(arguments.runs)
            ]
            found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            rows.append({"tokens": length, "way": way, **found})
            print(f"{length:6} tokens, {way:27} {found['peak_mb']:6.0f} MB {found['cpu_seconds']:6.1f} s", flush=True)
    result = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "window": arguments.window, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
