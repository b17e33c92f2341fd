"""What the approximate cache costs in tokens and saves in time, on a network that has learned something.

    python benchmarks/approximate.py [--steps 1500] [--prompts 32] [--out benchmarks/results/approximate.json]

A small LLaDA (0.6 M parameters) learns one page of this repository's documentation by heart, some minutes of one CPU
thread; then 64 tokens in blocks of 32 follow prompts of 96 tokens at temperature 0, from that page, where it is sure,
and from another, where it is not. For both scopes and several refresh intervals ("block": at new blocks alone, as
Fast-dLLM does): the share of tokens that equal the exact way's, of tokens that stand on the page there, the processed
token-positions and CPU seconds against the exact way's. One token chosen differently changes what follows, so agreement
counts consequences too.
"""

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memdlm.data import Collator
from memdlm.inference import Generation, GenerationConfig, generate
from memdlm.models import LLaDAConfig, build_model
from memdlm.randomness import derive
from memdlm.training import MemDLMTrainer, TrainingArguments

ROOT = Path(__file__).parent.parent
PAGES = {"trained": "docs/architecture.md", "new": "docs/memory.md"}
EOS, MASK = "<|endoftext|>", "<|mask|>"
PROMPT, NEW, BLOCK, LENGTH = 96, 64, 32, 160
REFRESH: tuple[int | None, ...] = (2, 4, 8, 16, None)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=[EOS, MASK], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, mask_token=MASK)


def trained(tokenizer: PreTrainedTokenizerFast, ids: Tensor, steps: int) -> tuple[torch.nn.Module, float]:
    """The network, and its last training loss in nats per masked token."""
    config = LLaDAConfig(
        vocab_size=len(tokenizer), d_model=96, n_layers=4, n_heads=4, mlp_hidden_size=256, max_sequence_length=512
    )
    model = build_model(config, seed=0)
    draw = derive("approximate windows")
    starts = torch.randint(len(ids) - LENGTH, (16 * steps,), generator=draw).tolist()
    rows = [{"input_ids": ids[start : start + LENGTH].tolist()} for start in starts]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = MemDLMTrainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.model.eval(), [entry["nll"] for entry in trainer.state.log_history if "nll" in entry][-1]


def compare(exact: Generation, other: Generation, truth: list[Tensor]) -> dict[str, float]:
    def share(first: list[Tensor], second: list[Tensor]) -> float:
        return statistics.fmean((a == b).float().mean().item() for a, b in zip(first, second, strict=True))

    known, found = ([row[PROMPT:] for row in each.sequences] for each in (exact, other))
    return {
        "token_agreement": share(found, known),
        "correct": share(found, truth),
        "positions": other.num_token_positions / exact.num_token_positions,
    }


def timed(call: Callable[[], Generation]) -> tuple[Generation, float]:
    start = time.process_time()
    return call(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/approximate.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = {seen: (ROOT / path).read_text() for seen, path in PAGES.items()}
    tokenizer = tokenizer_of(list(texts.values()))
    ids = {seen: torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for seen, text in texts.items()}
    model, nll = trained(tokenizer, ids["trained"], options.steps)
    rows = []
    for seen, source in ids.items():
        starts = torch.linspace(0, len(source) - PROMPT - NEW - 1, options.prompts).long().tolist()
        prompts = [source[start : start + PROMPT] for start in starts]
        truth = [source[start + PROMPT : start + PROMPT + NEW] for start in starts]
        common = {"max_new_tokens": NEW, "block_size": BLOCK, "eos_early_stop": False, "suppress_tokens": (0,)}

        def run(common=common, prompts=prompts, **more: Any) -> tuple[Generation, float]:
            return timed(lambda: generate(model, tokenizer, prompts, GenerationConfig(**common, **more)))

        run()  # the first call allocates
        exact, seconds = run()
        rows.append({"page": seen, "scope": "exact", **compare(exact, exact, truth), "time": 1.0})
        for scope in ("dual", "prefix"):
            for refresh in REFRESH:
                other, took = run(cache="approximate", cache_scope=scope, cache_refresh=refresh)
                found = compare(exact, other, truth) | {"time": took / seconds}
                rows.append({"page": seen, "scope": scope, "refresh": refresh or "block", **found})
                print(json.dumps(rows[-1]), flush=True)
    result = {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
    result |= {"steps": options.steps, "nll": nll, "prompts": options.prompts, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
