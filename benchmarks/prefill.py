"""A block-causal pass over a long prompt, its mask formed whole and in segments, in one process.

    python benchmarks/prefill.py [--lengths 2048 4096 8192] [--rounds 3] [--output benchmarks/results/prefill.json]

The medium LLaDA2.x network of benchmarks/decoding.py on random weights, one thread, seconds of process CPU time. Both
ways take turns; the ratio of their medians is what counts. The states they end in must agree.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from decoding import BLOCK, MODELS, V, machine

from memdlm.models import BlockCausal, build_model
from memdlm.models.blocks import masks
from memdlm.models.networks.requests import Request
from memdlm.randomness import derive

SEGMENT = masks.SEGMENT


def measure(length: int, rounds: int) -> dict:
    model = build_model(MODELS["llada2"](), seed=0).eval()
    ids = torch.randint(5, V, (1, length), generator=derive("prefill", length))
    one = torch.zeros(1, 1, dtype=torch.int64)
    times: dict[str, list[float]] = {"whole": [], "segments": []}
    found = {}
    for _ in range(rounds):
        for name, size in (("whole", 2**40), ("segments", SEGMENT)):
            masks.SEGMENT = size
            start = time.process_time()
            with torch.no_grad():
                request = Request(queries=one)
                out = model.model(ids, attention_pattern=BlockCausal(BLOCK), request=request)
                found[name] = out.last_hidden_state
            times[name].append(time.process_time() - start)
    gap = (found["whole"] - found["segments"]).abs().max().item()
    if gap > 1e-3:
        raise SystemExit(f"{length} tokens: the two ways differ by {gap}.")
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "length": length,
        "cpu_seconds": times,
        "time_ratio": medians["segments"] / medians["whole"],
        "largest_difference": gap,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for length in options.lengths:
        results.append(measure(length, options.rounds))
        print(f"{length} tokens: segments take {results[-1]['time_ratio']:.2f} of the whole mask's time", flush=True)
    if options.output is not None:
        facts = {"date": datetime.date.today().isoformat(), "machine": machine(), "results": results}
        options.output.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
