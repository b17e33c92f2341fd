"""Rows per CPU second of memdlm's encoding beside a plain batched `datasets.map`, in one run.

    python benchmarks/preprocess.py [--rows 4000] [--runs 5] [--out FILE]

`map` is what a user would write: `apply_chat_template` and the tokenizer on whole batches, all tokens as labels
(`map, all tokens`), or the prompt templated and tokenized as well and left out of the labels (`map, answers`). memdlm
does the second, checks it, and writes the same two columns and the lengths to disk. Both read the rows from memory and
write Arrow files. Ratios are of medians; process CPU time, tokenizers on one thread.

Tokenizers: the word-level ones of the tests' checkpoints, with their templates, and a byte-level BPE of 8,192 tokens
that is trained here on the repository's own documentation, with LLaDA's template.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memdlm.data.encoding import EncodingOptions
from memdlm.data.preprocess import preprocess
from memdlm.data.sources import load_conversations
from memdlm.models.hub.families import LLADA_TEMPLATE
from memdlm.models.hub.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[1]
CONTROL = ("<|endoftext|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mdm_mask|>")


def byte_level() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as LLaDA's is, on the documentation."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=list(CONTROL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(path) for path in sorted(ROOT.rglob("*.md"))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=CONTROL[1],
        eos_token=CONTROL[0],
        pad_token=CONTROL[0],
        mask_token=CONTROL[-1],
        additional_special_tokens=list(CONTROL[2:5]),
        chat_template=LLADA_TEMPLATE,
    )


def conversations(count: int, words: list[str]) -> list[dict[str, Any]]:
    """Draw one-turn conversations: questions of 20 to 200 words, answers of 20 to 200."""
    draw = random.Random(0)
    text = lambda: " ".join(draw.choices(words, k=draw.randint(20, 200)))
    return [
        {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]}
        for _ in range(count)
    ]


def by_map(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, out: Path, *, answers: bool) -> None:
    """Encode as a user would who knows `datasets`."""

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        labels = [list(each) for each in ids]
        if answers:
            prompts = [each[:-1] for each in batch["messages"]]
            heads = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
            for each, head in zip(labels, tokenizer(heads, add_special_tokens=False)["input_ids"], strict=True):
                each[: len(head)] = [-100] * len(head)
        return {"input_ids": ids, "labels": labels}

    rows.map(encode, batched=True, remove_columns=["messages"], cache_file_name=str(out / "map.arrow"))


def measured(job: Callable[[Path], None]) -> float:
    """Return the CPU seconds of one run in a folder of its own."""
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.process_time()
        job(folder)
        return time.process_time() - start
    finally:
        shutil.rmtree(folder)


def compare(name: str, tokenizer: PreTrainedTokenizerBase, words: list[str], count: int, runs: int) -> dict[str, Any]:
    """Time all ways in turn, `runs` times."""
    rows = conversations(count, words)
    table = datasets.Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "chat.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = load_conversations(str(source))
        ways: dict[str, Callable[[Path], Any]] = {
            "memdlm": lambda out: preprocess(splits, str(source), tokenizer, EncodingOptions(), out / "out"),
            "map, all tokens": lambda out: by_map(table, tokenizer, out, answers=False),
            "map, answers": lambda out: by_map(table, tokenizer, out, answers=True),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(runs):
            for way, job in ways.items():
                times[way].append(measured(job))
    rates = {way: count / statistics.median(each) for way, each in times.items()}
    ratios = {f"memdlm / {way}": rates["memdlm"] / rates[way] for way in ways if way != "memdlm"}
    print(
        name, {way: round(rate) for way, rate in rates.items()}, {way: round(each, 2) for way, each in ratios.items()}
    )
    return {"tokenizer": name, "rows_per_cpu_second": rates, "ratios": ratios, "cpu_seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/preprocess.json"))
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    tokens = [f"t{index}" for index in range(1, 400)]
    prose = sorted({word for path in ROOT.rglob("*.md") for word in path.read_text().split() if word not in CONTROL})
    cases = [
        (family, load_tokenizer(ROOT / "tests" / "golden" / family / "checkpoint"), tokens)
        for family in ("llada", "lladamoe")
    ]
    cases.append(("byte-level BPE", byte_level(), prose))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MEMDLM_CACHE"] = cache
        found = [compare(*case, arguments.rows, arguments.runs) for case in cases]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {each.__name__: each.__version__ for each in (datasets, tokenizers, transformers)},
        "rows": arguments.rows,
        "results": found,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
