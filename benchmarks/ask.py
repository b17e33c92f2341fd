"""What n questions on one document cost: a memory that is kept, a write per question, the document in every prompt.

    python benchmarks/ask.py [--quick] [--out benchmarks/results/ask.json]

Small dense network (random weights, float32), one thread, seconds of process CPU time (the machine may be shared). Each
part is the median over interleaved repetitions; the cost of n questions is measured for n = 1, 2 and 4 and the parts
add up to it, printed beside it. "Reading the file" is what every new process pays: checksums and the base's digest.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from memdlm.data import build_word_tokenizer
from memdlm.inference import GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import SmallDLMConfig, build_model

WORDS = [f"w{index}" for index in range(2000)]


def seconds(act: Callable[[], Any]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="256 tokens, two repetitions")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    length, repeats = (256, 2) if options.quick else (1024, 3)
    tokenizer = build_word_tokenizer(WORDS)
    network = SmallDLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=10,
        num_attention_heads=8,
    )
    model = build_model(network, seed=0).eval()
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[index] for index in torch.randint(len(WORDS), (length,), generator=generator).tolist()]
    document, questions = " ".join(words), [" ".join(words[index : index + 6]) for index in range(4)]
    ids = torch.tensor([tokenizer(document)["input_ids"]])
    decoding = GenerationConfig(max_new_tokens=8, steps=8, suppress_tokens=(0,))

    def ask(texts: list[str], memory: ParametricMemory | None = None) -> None:
        for text in texts:
            generate(model, tokenizer, [text], decoding, memory=memory)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "doc.mem"

        def write() -> None:
            with memory.write(ids):
                memory.save(path)

        def fresh() -> None:
            again = ParametricMemory(model, MemoryConfig(), mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
            again.load(path)

        def kept(count: int) -> None:
            write()
            with memory.recall(path):
                ask(questions[:count])

        def one() -> None:
            with memory.recall(path):
                ask(questions[:1])

        jobs: dict[str, Callable[[], Any]] = {
            "write and save": write,
            "reading the file": fresh,
            "a question, document gone": one,
            "a question, document in the prompt": lambda: ask([f"{document} {questions[0]}"]),
            # What `generate(memory=...)` does: the prompt, document included, is written for every question.
            "a question, document written for it and in the prompt": lambda: ask(
                [f"{document} {questions[0]}"], memory
            ),
            **{f"write once, {count} questions": lambda count=count: kept(count) for count in (1, 2, 4)},
        }
        for act in jobs.values():
            act()
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for name, act in jobs.items():
                times[name].append(seconds(act))
        size = sum(file.stat().st_size for file in path.iterdir())
    median = {name: statistics.median(each) for name, each in times.items()}
    report(median, size)
    if options.out is not None:
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread",
            "tokens": length,
            "parameters": model.num_parameters(),
            "memory_bytes": size,
            "seconds": times,
            "median": median,
        }
        Path(options.out).write_text(json.dumps(record, indent=2) + "\n")


def report(median: dict[str, float], size: int) -> None:
    for name, value in median.items():
        print(f"{name:<55} {value:8.3f} s")
    print(f"{'memory file':<55} {size / 2**20:8.2f} MiB")
    once, each = median["write and save"], median["a question, document gone"]
    for count in (1, 2, 4):
        found = median[f"write once, {count} questions"]
        print(f"write once, {count} questions: {found:.3f} s; the parts add up to {once + count * each:.3f} s")
    shown = median["a question, document in the prompt"]
    print(f"cheaper than showing the document from question {1 + int(once / (shown - each))} on")


if __name__ == "__main__":
    main()
