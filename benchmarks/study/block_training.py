"""What a block-causal network should be fine-tuned with: block diffusion, or full attention over the whole row.

    python benchmarks/study/block_training.py --seeds 0 1 2

A small SDAR network learns by block diffusion to copy and to reverse 12 digits of base 3. It is then fine-tuned on a
new task, either as MDLM training does (the whole noised row under full attention) or by block diffusion. It answers as
it is decoded: block after block, each behind finished ones. Tasks: `sum`, the running sum modulo 3, where a token
follows from a digit and the token before it, or the one behind it; `difference`, its inverse, which follows from the
prompt alone. All seeds (of data and noise) begin from the same network. Rows are written as they are measured.
"""

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import PreTrainedModel, PrinterCallback

from memdlm.data import Collator
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import Decoder, GenerationConfig
from memdlm.models import SDARConfig, build_model
from memdlm.models.blocks.masks import Full
from memdlm.randomness import derive
from memdlm.training import MemDLMTrainer, TrainingArguments

BASE, DIGITS, BLOCK = 3, 12, 4
TASKS = ("copy", "reverse", "sum", "difference")
FIRST = ("copy", "reverse")
"""What the network knows before it is fine-tuned."""
ARMS = {
    "full attention": (None, 1.0),
    "block diffusion": (BLOCK, 1.0),
    "block diffusion, half the steps": (BLOCK, 0.5),
}
"""Block size and share of the steps; a step of block diffusion passes twice the columns."""
TOKENIZER = build_word_tokenizer([*TASKS, *map(str, range(BASE)), "="])


def answer_of(task: str, digits: list[int]) -> list[int]:
    if task == "copy":
        return digits
    if task == "reverse":
        return digits[::-1]
    if task == "sum":
        return [sum(digits[: place + 1]) % BASE for place in range(len(digits))]
    return [(digit - before) % BASE for digit, before in zip(digits, [0, *digits], strict=False)]


def rows_of(tasks: tuple[str, ...], count: int, *keys: int | str) -> list[dict[str, list[int]]]:
    generator = derive("block training", *tasks, *keys)
    rows = []
    for number in range(count):
        task, digits = tasks[number % len(tasks)], torch.randint(0, BASE, (DIGITS,), generator=generator).tolist()
        prompt = TOKENIZER.convert_tokens_to_ids([task, *map(str, digits), "="])
        answer = TOKENIZER.convert_tokens_to_ids([str(digit) for digit in answer_of(task, digits)])
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def trainer_of(model: PreTrainedModel, rows: list, held_out: list, *, block: int | None, **options) -> MemDLMTrainer:
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        block_size=block,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = MemDLMTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=Collator(TOKENIZER.pad_token_id),
        processing_class=TOKENIZER,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def accuracy(model: PreTrainedModel, rows: list, *, steps: int, pattern: Full | None = None) -> dict[str, float]:
    """Decode the answers greedily, `steps` passes for every 4 tokens; returns the share of tokens and of answers."""
    per_block = {"steps_per_block": steps, "threshold": 1.0} if pattern is None else {"steps": steps * DIGITS // BLOCK}
    config = GenerationConfig(max_new_tokens=DIGITS, **per_block)
    prompts = [torch.tensor(row["input_ids"][:-DIGITS]) for row in rows]
    decoder = Decoder(model.eval(), TOKENIZER, config, attention_pattern=pattern)
    found = torch.stack([each[-DIGITS:] for each in decoder.generate(prompts).sequences])
    is_right = found == torch.tensor([row["input_ids"][-DIGITS:] for row in rows])
    return {"tokens": is_right.float().mean().item(), "answers": is_right.all(1).float().mean().item()}


def measured(model: PreTrainedModel, held_out: list) -> dict:
    """Score a model as it is decoded, by both bounds, and under the attention it does not decode with."""
    nll = {
        name: trainer_of(model, held_out, held_out, block=block, max_steps=1).evaluate()["eval_nll"]
        for name, block in (("block_causal_nll", BLOCK), ("full_attention_nll", None))
    }
    return {
        **nll,
        "one_token_a_pass": accuracy(model, held_out, steps=BLOCK),
        "one_block_a_pass": accuracy(model, held_out, steps=1),
        "full_attention_decoding": accuracy(model, held_out, steps=BLOCK, pattern=Full()),
    }


def pretrained(seed: int, steps: int) -> PreTrainedModel:
    config = SDARConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    model = build_model(config, seed=seed)
    trainer_of(model, rows_of(FIRST, 20000, "first", seed), [], block=BLOCK, max_steps=steps, seed=seed).train()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tasks", nargs="+", default=["sum"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "block_training.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
    began = time.process_time()
    model = pretrained(0, arguments.first_steps)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    seconds = time.process_time() - began
    known = measured(model, rows_of(FIRST, arguments.rows, "held out"))
    rows = [{"arm": "before", "task": "+".join(FIRST), "seed": 0, "steps": arguments.first_steps}]
    rows[0] |= {"cpu_seconds": seconds, **known}
    print(line(rows[0]), flush=True)
    for task, seed, (arm, (block, share)) in itertools.product(arguments.tasks, arguments.seeds, ARMS.items()):
        model.load_state_dict(weights)
        steps, began = round(arguments.steps * share), time.process_time()
        data = rows_of((task,), 20000, "fine-tuning", seed)
        trainer_of(model.train(), data, [], block=block, max_steps=steps, seed=seed).train()
        seconds = time.process_time() - began
        found = measured(model, rows_of((task,), arguments.rows, "held out"))
        rows.append({"arm": arm, "task": task, "seed": seed, "steps": steps, "cpu_seconds": seconds, **found})
        print(line(rows[-1]), flush=True)
        arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def line(row: dict) -> str:
    return (
        f"seed {row['seed']} {row['task']:<10} {row['arm']:<32} nll {row['block_causal_nll']:.3f} (full "
        f"{row['full_attention_nll']:.3f})  tokens {row['one_token_a_pass']['tokens']:.3f} "
        f"{row['one_block_a_pass']['tokens']:.3f}  under full attention "
        f"{row['full_attention_decoding']['tokens']:.3f}  {row['cpu_seconds']:.0f} CPU s"
    )


if __name__ == "__main__":
    main()
