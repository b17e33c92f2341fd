"""Decoding against the plain loop that recomputes everything, on the same random weights, in one process.

    python benchmarks/decoding.py [--families llada2 lladamoe] [--prompts 2048] [--batches 1] [--new 64] [--rounds 3]
                                  [--memory] [--cache approximate] [--compile default] [--prompt_cache]
                                  [--output benchmarks/results/decoding.json]

Medium models (hidden 512, 10 layers, vocabulary 32768), on the CPU in one thread; both ways take turns. The ratio of
the medians is what counts; times are of the CPU, so that other programs do not count. The plain loop is the published
one: the whole canvas (LLaDA2.x: up to the block's end) through the network at every step, every position projected
onto the vocabulary, rows one after the other. It must give the same tokens, or the run stops; the approximate cache
need not, and its agreement is reported. With --prompt_cache ours has decoded the same prompts without memory before.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from published_loops import Plain
from torch import Tensor

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import GenerationConfig, PromptCache, generate
from memdlm.inference.config import COMPILE_MODES
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LLaDA2MoeConfig, LLaDAConfig, LLaDAMoEConfig, build_model
from memdlm.randomness import derive

V = 32768
SIZES = {"vocab_size": V, "hidden_size": 512, "num_hidden_layers": 10, "num_attention_heads": 8}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4}
MODELS = {
    "llada": lambda: LLaDAConfig(vocab_size=V, d_model=512, n_layers=10, n_heads=8, mlp_hidden_size=1536),
    "lladamoe": lambda: LLaDAMoEConfig(**SIZES, **EXPERTS, expert_intermediate_size=256),
    "llada2": lambda: LLaDA2MoeConfig(
        **SIZES,
        **EXPERTS,
        num_key_value_heads=4,
        intermediate_size=1024,
        moe_intermediate_size=256,
        n_group=4,
        topk_group=2,
    ),
}
WANTED = {
    ("llada2", 2048, 1): {"position_ratio": 15.0, "time_ratio": 8.0},
    ("lladamoe", 1024, 1): {"time_ratio": 1 / 0.7},
}
"""(family, prompt, batch) -> what must be reached without a memory (a write takes as long both ways)."""


def timed(run: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def measure(family: str, prompt: int, batch: int, options: argparse.Namespace) -> dict:
    model = build_model(MODELS[family](), seed=0).eval()
    tokenizer = build_word_tokenizer(f"w{index:05}" for index in range(V - 5))
    rows = list(torch.randint(5, V, (batch, prompt), generator=derive("benchmark", prompt, batch)))
    config = GenerationConfig(
        max_new_tokens=options.new, eos_early_stop=False, cache=options.cache, compile=options.compile
    )
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=tokenizer.mask_token_id) if options.memory else None
    known = PromptCache(model, memory) if options.prompt_cache else None
    if options.prompt_cache or options.compile:
        generate(model, tokenizer, rows, config, prompt_cache=known)
    plain = Plain(model, tokenizer.mask_token_id)
    loop = plain.blocks if family == "llada2" else plain.whole

    def theirs() -> list[Tensor]:
        found = []
        for row in rows:
            writes = (
                nullcontext() if memory is None else memory.write(row[None], generator=[derive("memdlm.generate", 0)])
            )
            with writes:
                found.append(loop(row, options.new))
        return found

    times = {"plain": [], "ours": []}
    for _ in range(options.rounds):
        plain.passes = plain.positions = 0
        seconds, expected = timed(theirs)
        times["plain"].append(seconds)
        seconds, result = timed(lambda: generate(model, tokenizer, rows, config, memory=memory, prompt_cache=known))
        times["ours"].append(seconds)
    responses = [(a[prompt:], b[prompt:]) for a, b in zip(result.sequences, expected, strict=True)]
    agreement = statistics.mean((a == b[: len(a)]).float().mean().item() for a, b in responses)
    if options.cache != "approximate" and agreement < 1:
        raise SystemExit(
            f"{family}, prompt {prompt}, batch {batch}: other tokens than the plain loop ({agreement:.3f})."
        )
    median = {name: statistics.median(values) for name, values in times.items()}
    tokens = batch * options.new
    return {
        "family": family,
        "prompt": prompt,
        "batch": batch,
        "new_tokens": options.new,
        "memory": options.memory,
        "cache": options.cache,
        "compile": options.compile,
        "prompt_cache": options.prompt_cache,
        "cpu_seconds": times,
        "tokens_per_second": {name: tokens / seconds for name, seconds in median.items()},
        "time_ratio": median["plain"] / median["ours"],
        "forward_passes": {"plain": plain.passes, "ours": result.num_forward_passes},
        "token_positions": {"plain": plain.positions, "ours": result.num_token_positions},
        "reused_positions": result.num_reused_positions,
        "position_ratio": plain.positions / result.num_token_positions,
        "token_agreement": agreement,
    }


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "torch": torch.__version__, "threads": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llada2", "lladamoe"], choices=list(MODELS))
    parser.add_argument("--prompts", nargs="+", type=int, default=[1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cache", default="exact", choices=("exact", "none", "approximate"))
    parser.add_argument("--compile", default=None, choices=COMPILE_MODES)
    parser.add_argument("--prompt_cache", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, missed = [], 0
    for family in options.families:
        for prompt in options.prompts:
            for batch in options.batches:
                found = measure(family, prompt, batch, options)
                results.append(found)
                print(
                    f"{family:9} prompt {prompt:5} batch {batch}: {found['time_ratio']:5.1f}x less time, "
                    f"{found['position_ratio']:5.1f}x fewer positions, agreement {found['token_agreement']:.3f}",
                    flush=True,
                )
                for name, least in WANTED.get((family, prompt, batch), {}).items():
                    if options.new == 64 and options.cache == "exact" and not options.memory and found[name] < least:
                        missed += 1
                        print(f"  {name} {found[name]:.2f} is below {least:.2f}", flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"date": datetime.date.today().isoformat(), "machine": machine(), "results": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
