"""Decoding at LLaDA2.x's true shape: tokens per second, and milliseconds of a step, beside the published loop.

    python benchmarks/gpu/decoding.py

One prompt (and a batch of 8), 64 new tokens at temperature 0; with the exact cache, compiled, and with a memory of the
prompt. The published loop recomputes everything up to the block's end. Random weights in bfloat16: the two ways may
round a confidence differently and then go apart, so the share of equal tokens is reported, not demanded.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from card import Card, Row, arguments, card_of, run_part, spread
from published_loops import Plain
from shapes import MASK, Shelf, ids_of, words_of
from torch import Tensor

from memdlm.inference import GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive

JOBS: dict[str, dict[str, Any]] = {
    "no cache": {"cache": "none"},
    "exact cache": {},
    "exact cache, memory": {"has_memory": True},
    "exact cache, compiled": {"compile": "default"},
    "exact cache, CUDA graphs": {"compile": "reduce-overhead"},
    "exact cache, memory, CUDA graphs": {"has_memory": True, "compile": "reduce-overhead"},
    "exact cache, batch of 8": {"batch": 8},
    "exact cache, batch of 8, CUDA graphs": {"batch": 8, "compile": "reduce-overhead"},
}


def measured(
    card: Card,
    shelf: Shelf,
    *,
    batch: int = 1,
    has_memory: bool = False,
    compile: str | None = None,
    cache: str = "exact",
) -> Row:
    prompt, new, repetitions = (40, 32, 1) if card.is_quick else (1024, 64, 3)
    found = shelf.of("llada2")
    tokenizer = words_of(found.model)
    rows = list(ids_of(found.model, batch, prompt))
    memory = ParametricMemory(found.model, MemoryConfig.paper(), mask_token_id=MASK) if has_memory else None
    config = GenerationConfig(max_new_tokens=new, eos_early_stop=False, compile=compile, cache=cache)
    results: list[Any] = []
    loop = Plain(found.model, MASK)
    expected: list[list[Tensor]] = []

    def ours() -> None:
        results.append(generate(found.model, tokenizer, rows, config, memory=memory))

    def plain() -> None:
        loop.passes = loop.positions = 0
        decoded = []
        for row in rows:
            generator = [derive("memdlm.generate", 0)]
            with nullcontext() if memory is None else memory.write(row[None], generator=generator):
                decoded.append(loop.blocks(row, new))
        expected.append(decoded)

    # The first calls compile, and record graphs.
    warm = 2 if compile else 1
    calls: dict[str, Callable[[], None]] = {"ours": ours, "plain": plain}
    first = card.seconds(ours)
    seconds = card.in_turns(calls, repetitions, warm=0 if card.is_quick else warm)
    peaks = {} if card.is_quick else {name: card.peak_bytes(call) for name, call in calls.items()}
    result = results[-1]
    same = [
        (a[prompt:].cpu() == b[prompt:].cpu()).float().mean().item()
        for a, b in zip(result.sequences, expected[-1], strict=True)
    ]
    row: Row = {name: spread(each) for name, each in seconds.items()}
    passes = {"ours": result.num_forward_passes, "plain": loop.passes}
    positions = {"ours": result.num_token_positions, "plain": loop.positions}
    for name in calls:
        median = row[name]["median_s"]
        row[name] |= {
            "forward_passes": passes[name],
            "token_positions": positions[name],
            "ms_per_pass": 1e3 * median / passes[name],
            "tokens_per_s": batch * new / median,
            "peak_bytes": peaks.get(name),
        }
    return {
        "prompt": prompt,
        "new_tokens": new,
        "batch": batch,
        "has_memory": has_memory,
        "compile": compile,
        "cache": cache,
        **found.about(),
        **row,
        "first_call_s": round(first, 3),
        "plain_over_ours": row["plain"]["median_s"] / row["ours"]["median_s"],
        "token_agreement": statistics.mean(same),
    }


def main() -> int:
    options = arguments("decoding", __doc__, budget=420)
    card = card_of(options)
    shelf = Shelf(card, {})
    jobs = {name: partial(measured, card, shelf, **each) for name, each in JOBS.items()}
    with torch.no_grad():
        return run_part("decoding", jobs, options, {"family": "llada2"})


if __name__ == "__main__":
    raise SystemExit(main())
