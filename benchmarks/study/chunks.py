"""Documents longer than what is written at once: in one piece, in chunks, and cut to the last chunk.

    python benchmarks/study/chunks.py --seeds 0 1 2 [--out benchmarks/study/results/chunks.json]

A model learns to have documents of 36 words written (context dropped, 400 steps), then goes on for 300 steps on
documents of 72 words in two chunks. Before and after: recall at 1 to 16 times 36 words, written in one piece, in chunks
of 36, and with all but the last 36 words cut off (the truncation baseline, which can know the facts of those only).
Rows are written as they are measured; seeds that the file already has are not run again.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from recall_suite import EVEN
from study_rows import Rows

from memdlm import ParametricMemory, load_model
from memdlm.data.synthetic import Sample
from memdlm.evaluation import recall
from memdlm.workflows.studies.plans import OURS, arms, closed_book
from memdlm.workflows.studies.recall_study import RecallData, recall_data, trained

CHUNK, TIMES = 36, (1, 2, 4, 8, 16)


def cut(sample: Sample) -> Sample:
    """The same questions about the last chunk of the context."""
    tail = " ".join(sample.context.split()[-CHUNK:])
    first, *others = sample.without_context()
    return Sample([{**first, "content": f"{tail} {first['content']}"}, *others], sample.answers, tail)


def accuracy(folder: str, data: RecallData, seed: int, num_questions: int) -> list[dict]:
    model = load_model(folder).eval()
    mask = data.tokenizer.mask_token_id
    config = ParametricMemory(model, mask_token_id=mask).config
    rows = []
    for way in ("one piece", "chunks", "last chunk"):
        chunk = CHUNK if way == "chunks" else None
        memory = ParametricMemory(model, dataclasses.replace(config, chunk_length=chunk), mask_token_id=mask)
        for length, samples in data.by_length.items():
            asked = [cut(sample) for sample in samples] if way == "last chunk" else samples
            found = recall(
                model, data.tokenizer, asked, steps=num_questions, seed=seed, memory=memory, context="dropped"
            )
            rows.append({"way": way, "length": length, "accuracy": found.accuracy, "questions": found.questions})
    return rows


def run(seed: int) -> dict:
    plan = closed_book(times=TIMES, training=EVEN, schedule=((1.0, 1),))
    training = EVEN | {"warmup_steps": 20}
    later = closed_book(train_length=2 * CHUNK, steps=300, learning_rate=2e-3, training=training, schedule=((1.0, 1),))
    data, config = recall_data(plan), arms(plan)[OURS]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        trained(plan, data, config, seed).save_final(one)
        before = accuracy(one, data, seed, plan.task.num_questions)
        model = load_model(one)
        chunked = dataclasses.replace(config, chunk_length=CHUNK)
        trained(later, recall_data(later), chunked, seed, model=model).save_final(two)
        return {"seed": seed, "before": before, "after": accuracy(two, data, seed, plan.task.num_questions)}


def line(rows: list[dict], way: str) -> str:
    return " ".join(f"{row['length']}:{row['accuracy']:.3f}" for row in rows if row["way"] == way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/chunks.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    for seed in arguments.seeds:
        if not rows.where(seed=seed):
            row = rows.add(run(seed))
            for when in ("before", "after"):
                for way in ("one piece", "chunks", "last chunk"):
                    print(f"seed {seed} {when:6} {way:10} {line(row[when], way)}", flush=True)


if __name__ == "__main__":
    main()
