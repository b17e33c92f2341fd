"""What continuous batching is worth: 8 requests with 8 memories in one batch, against one by one and one memory.

    python benchmarks/serving.py [--families llada2 llada] [--rounds 3] [--threads 1] [--quick] [--out FILE]

Medium models (hidden 512, 10 layers, vocabulary 32768; random weights, float32). All ways take turns in one process;
what counts are the ratios of their CPU times, paired by round (with one thread; the machine may be shared). The answers
of the batch must be those of the requests alone, or the run stops. A profile says how much of a pass is arithmetic:
operations per second for one row and for eight. Joining and leaving are timed by themselves, beside a step.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from counting import flops
from decoding import MODELS, V

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import Decoder, GenerationConfig, generate
from memdlm.memory import FastWeights, MemoryConfig, ParametricMemory
from memdlm.models import build_model
from memdlm.randomness import derive
from memdlm.serving import Engine, GenerationRequest, MemoriesInProcess

REQUESTS = 8


def seconds(act: Callable[[], Any]) -> float:
    """CPU time, of all threads."""
    start = time.process_time()
    act()
    return time.process_time() - start


def both(act: Callable[[], Any]) -> tuple[float, float]:
    """CPU time and time on the wall."""
    start = time.perf_counter()
    return seconds(act), time.perf_counter() - start


class Bench:
    """One family: its model, eight memories, eight requests."""

    def __init__(self, family: str, prompt: int, new: int) -> None:
        self.family = family
        self.tokenizer = build_word_tokenizer(f"w{index:05}" for index in range(V - 5))
        self.model = build_model(MODELS[family](), seed=0).eval()
        self.prompts = list(torch.randint(5, V, (REQUESTS, prompt), generator=derive("serving", family)))
        self.config = GenerationConfig(max_new_tokens=new, block_size=None if family == "llada2" else new)
        self.memory = ParametricMemory(
            self.model, MemoryConfig(), mask_token_id=self.tokenizer.mask_token_id, tokenizer=self.tokenizer
        )
        texts = torch.randint(5, V, (REQUESTS, 64), generator=derive("serving texts"))
        self.store, self.saved = MemoriesInProcess(), []
        with self.memory.write(texts):
            self.saved = [self.memory.export(row) for row in range(REQUESTS)]
        for row, saved in enumerate(self.saved):
            self.store.keep(f"m{row}", saved)
        self.engines: dict[int, Engine] = {}

    def engine(self, slots: int) -> Engine:
        """Engines are kept, as a server would: memories are on the device, nothing is read from files."""
        if slots not in self.engines:
            # Without the prefix cache: every round would find its prompts.
            decoder = Decoder(self.model, self.tokenizer)
            self.engines[slots] = Engine(decoder, slots=slots, store=self.store, prefix_bytes=0)
        return self.engines[slots]

    def serve(self, slots: int, memory: Callable[[int], str | None]) -> list[list[int]]:
        engine = self.engine(slots)
        tickets = [
            engine.submit(GenerationRequest(prompt=prompt.tolist(), config=self.config, memory=memory(row)))
            for row, prompt in enumerate(self.prompts)
        ]
        while engine.step():
            pass
        return [list(ticket.result(0).ids) for ticket in tickets]

    def alone(self) -> list[list[int]]:
        found = []
        for saved, prompt in zip(self.saved, self.prompts, strict=True):
            with self.memory.recall(saved):
                row = generate(self.model, self.tokenizer, [prompt], self.config).sequences[0]
            found.append(row[len(prompt) :].tolist())
        return found

    def ways(self) -> dict[str, Callable[[], Any]]:
        return {
            "batch, eight memories": lambda: self.serve(REQUESTS, lambda row: f"m{row}"),
            "batch, one memory": lambda: self.serve(REQUESTS, lambda row: "m0"),
            "batch, no memory": lambda: self.serve(REQUESTS, lambda row: None),
            "engine, one by one": lambda: self.serve(1, lambda row: f"m{row}"),
            "generate, one by one": self.alone,
        }


def throughput(bench: Bench, rounds: int) -> dict[str, Any]:
    ways = bench.ways()
    answers = {name: act() for name, act in ways.items()}
    expected = answers["generate, one by one"]
    for name in ("batch, eight memories", "engine, one by one"):
        if answers[name] != expected:
            raise SystemExit(f"{bench.family}: {name} gives other tokens than generate.")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, act in ways.items():
            times[name].append(both(act))
    best = times["batch, eight memories"]

    def ratios(kind: int) -> dict[str, float]:
        return {
            name: statistics.median(other[kind] / own[kind] for other, own in zip(found, best, strict=True))
            for name, found in times.items()
        }

    return {
        "cpu_seconds": {name: [cpu for cpu, _ in found] for name, found in times.items()},
        "wall_seconds": {name: [wall for _, wall in found] for name, found in times.items()},
        "ratio_to_batch": ratios(0),
        "wall_ratio_to_batch": ratios(1),
        "tokens": sum(len(row) for row in expected),
    }


def profile(bench: Bench, rounds: int) -> dict[str, Any]:
    """Operations and CPU time of one pass over one row, and over eight, as decoding makes it."""
    found: dict[str, Any] = {}
    width = 32 if bench.family == "llada2" else len(bench.prompts[0]) + (bench.config.max_new_tokens or 0)
    for rows in (1, REQUESTS):
        ids = torch.randint(5, V, (rows, width), generator=derive("profile"))
        asked = torch.cat([torch.arange(width - 16, width) + row * width for row in range(rows)])
        with torch.no_grad():
            call = partial(bench.model, input_ids=ids, positions=asked)
            work = flops(call)
            spent = min(seconds(call) for _ in range(rounds))
        found[f"{rows} rows"] = {"gflop": work / 1e9, "seconds": spent, "gflop_per_second": work / 1e9 / spent}
    one, many = found["1 rows"], found[f"{REQUESTS} rows"]
    found["most_that_batching_can_give"] = many["gflop_per_second"] / one["gflop_per_second"]
    return found


def attached(fast: FastWeights, tensors: list[torch.Tensor], samples: int) -> None:
    with fast.holding(tensors, (samples, None)):
        pass


def membership(bench: Bench, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time: a step of eight rows, and what it costs that one leaves and another joins."""
    engine = bench.engine(REQUESTS)
    batch, pool = engine._batch, engine._batch.pool
    engine_ids = iter(range(10**6))

    def submit() -> None:
        row = next(engine_ids) % REQUESTS
        prompt = bench.prompts[row].tolist()
        engine.submit(GenerationRequest(prompt=prompt, config=bench.config, memory=f"m{row}"))

    for _ in range(REQUESTS):
        submit()
    engine.step()
    times: dict[str, list[float]] = {name: [] for name in ("step", "leave", "join", "new copies", "attach")}
    for _ in range(rounds):
        times["step"].append(seconds(engine.step))
        first = batch.running[0]
        first.ticket.cancel()
        times["leave"].append(seconds(batch.give_up))
        submit()
        times["join"].append(seconds(batch.admit))
        reads = [each.memory for each in pool.owners]
        times["new copies"].append(seconds(partial(pool.stacks.of, reads)))
        times["attach"].append(seconds(partial(attached, *pool.stacks.of(reads))))
    for running in list(batch.running):
        running.ticket.cancel()
    while engine.step():
        pass
    return {name: 1000 * statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", default=["llada2", "llada"], choices=sorted(MODELS))
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="8 new tokens, one round")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    new, rounds = (8, 1) if options.quick else (options.new, options.rounds)
    results = {}
    for family in options.families:
        bench = Bench(family, options.prompt, new)
        found = {
            **throughput(bench, rounds),
            "profile": profile(bench, max(3, rounds)),
            "milliseconds": membership(bench, min(new - 2, 3 * rounds)),
        }
        results[family] = found
        report(family, found)
    if options.out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
            "threads": options.threads,
            "requests": REQUESTS,
            "prompt": options.prompt,
            "new_tokens": new,
            "results": results,
        }
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")


def report(family: str, found: dict[str, Any]) -> None:
    print(f"{family}: {found['tokens']} tokens")
    for name, times in found["cpu_seconds"].items():
        cpu, wall = found["ratio_to_batch"][name], found["wall_ratio_to_batch"][name]
        print(f"  {name:<24} {statistics.median(times):8.3f} s   {cpu:5.2f} times the batch's (wall {wall:.2f})")
    for name, part in found["profile"].items():
        if isinstance(part, dict):
            print(f"  a pass of {name}: {part['gflop']:.2f} Gflop at {part['gflop_per_second']:.1f} Gflop/s")
    print(f"  most that batching can give: {found['profile']['most_that_batching_can_give']:.2f}")
    print("  ms: " + ", ".join(f"{name} {value:.2f}" for name, value in found["milliseconds"].items()))


if __name__ == "__main__":
    main()
