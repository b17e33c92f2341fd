"""Kept memories of one model that learned to be written: from files, in chunks, side by side, compressed.

    python benchmarks/study/memories.py --seeds 0 1 2
    python benchmarks/study/memories.py --smoke --out /tmp/smoke.json      # everything once, tiny: no result

The model of `recall.py --context dropped` (key-value facts, 24 keys, 8 facts per document). A document is written by
itself, saved, and asked its 8 questions from the file, in prompts that hold nothing else. Accuracy is exact match;
losses are nats per masked token of the documents. Documents share keys by chance; `disjoint` ones do not. Chunks share
their gradient steps and overlap by 4 words. Rows are written as they are measured; seeds that the file already has are
not run again.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from study_rows import SMOKE, SMOKE_STEPS, Rows
from torch import Tensor

from memdlm.data.synthetic import KeyValueRecall, exact_match
from memdlm.evaluation.masked_loss import interference
from memdlm.inference import GenerationConfig, generate
from memdlm.memory import ParametricMemory, SavedMemory, average, compress, concatenate
from memdlm.models import load_model, load_tokenizer
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import recall_data, trained

DOCUMENTS = 64
OVERLAP = 4


@dataclass(frozen=True)
class Document:
    words: str
    questions: list[str]
    answers: tuple[str, ...]

    @property
    def keys(self) -> set[str]:
        return {word for word in self.words.split() if word.startswith("k")}


def documents(task: KeyValueRecall, length: int, count: int) -> Iterator[Document]:
    for sample in task.records(count, length, seed="recall test"):
        first, *others = [turn["content"] for turn in sample.messages if turn["role"] == "user"]
        words = first.split()
        yield Document(" ".join(words[:length]), [" ".join(words[length:]), *others], sample.answers)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load_model(folder), load_tokenizer(folder)
        self.memory = ParametricMemory(self.model, mask_token_id=self.tokenizer.mask_token_id, tokenizer=self.tokenizer)
        self.folder = folder

    def ids(self, document: Document) -> Tensor:
        return torch.tensor(self.tokenizer(document.words)["input_ids"])

    def written(self, document: Document, chunk: int | None = None) -> SavedMemory:
        overlap = 0 if chunk is None else OVERLAP
        memory = self.memory.with_options(chunk_length=chunk, chunk_overlap=overlap)
        with memory.write(self.ids(document)[None]):
            memory.save(self.folder / "doc.mem")
        return self.memory.load(self.folder / "doc.mem")

    def correct(self, document: Document, saved: SavedMemory | None) -> int:
        prompts = [[{"role": "user", "content": question}] for question in document.questions]

        def ask() -> list[str]:
            return generate(self.model, self.tokenizer, prompts, GenerationConfig(max_new_tokens=2)).texts

        if saved is None:
            found = ask()
        else:
            with self.memory.recall(saved):
                found = ask()
        return sum(map(exact_match, document.answers, found))

    def accuracy(self, groups: Sequence[Sequence[Document]], memories: Sequence[SavedMemory | None]) -> float:
        """One memory per group of documents."""
        right = [self.correct(each, saved) for group, saved in zip(groups, memories, strict=True) for each in group]
        return sum(right) / sum(len(each.questions) for group in groups for each in group)


def groups_of(documents: Sequence[Document], size: int, disjoint: bool) -> list[list[Document]]:
    """Cut documents into groups, if asked for of documents without a common key (then leaving some out)."""
    left, groups = list(documents), []
    while left:
        group = [left.pop(0)]
        for other in list(left):
            if len(group) < size and not (disjoint and any(other.keys & each.keys for each in group)):
                group.append(other)
                left.remove(other)
        if len(group) == size:
            groups.append(group)
    return groups


def combinations(bench: Bench, found: Sequence[Document], own: dict[str, SavedMemory]) -> list[dict[str, Any]]:
    start, rows = bench.memory.unwritten(), []
    for size, disjoint in ((2, False), (2, True), (4, False)):
        groups = groups_of(found, size, disjoint)
        parts = [[own[each.words] for each in group] for group in groups]
        for name, joined in (
            ("sum, start once", [concatenate(each, start=start) for each in parts]),
            ("average", [average(each) for each in parts]),
        ):
            losses = [
                each
                for group, part, both in list(zip(groups, parts, joined, strict=True))[:8]
                for each in interference(bench.memory, {d.words: bench.ids(d) for d in group}, part, both)
            ]
            rows.append(
                {
                    "documents": size,
                    "disjoint": disjoint,
                    "how": name,
                    "groups": len(groups),
                    "accuracy": bench.accuracy(groups, joined),
                    **{key: mean(getattr(each, key) for each in losses) for key in ("without", "own", "combined")},
                }
            )
    return rows


def measure(plan: RecallPlan, seed: int, count: int) -> dict[str, Any]:
    """Train a model with `seed`, and return all that is measured of its memories of `count` documents."""
    with tempfile.TemporaryDirectory() as folder:
        trained(plan, recall_data(plan), arms(plan)[OURS], seed).save_final(folder)
        bench = Bench(Path(folder))
        found = list(documents(plan.task, plan.train_length, count))
        own = {each.words: bench.written(each) for each in found}
        single = [[each] for each in found]
        row: dict[str, Any] = {
            "seed": seed,
            "own memory": bench.accuracy(single, list(own.values())),
            "no memory": bench.accuracy(single, [None] * len(single)),
            "compressed": [],
            "combined": combinations(bench, found, own),
            "chunks": [],
        }
        for rank in (8, 4, 2):
            small = [compress(each, rank) for each in own.values()]
            error = mean(each.provenance["compression"]["relative_error"] for each in small)
            accuracy = bench.accuracy(single, small)
            row["compressed"].append({"rank": rank, "accuracy": accuracy, "relative_error": error})
        for times, pieces in ((4, 1), (4, 2), (4, 4), (16, 1), (16, 4), (16, 16)):
            length = times * plan.train_length
            chunk = None if pieces == 1 else length // pieces
            longer = list(documents(plan.task, length, count // 4))
            written = [bench.written(each, chunk) for each in longer]
            accuracy = bench.accuracy([[each] for each in longer], written)
            row["chunks"].append({"words": length, "chunk": chunk, "accuracy": accuracy})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/memories.json"))
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny: no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, plan = Rows(options.out), closed_book(**SMOKE, steps=SMOKE_STEPS) if options.smoke else closed_book()
    for seed in options.seeds:
        if not rows.where(seed=seed):
            print(rows.add(measure(plan, seed, 16 if options.smoke else DOCUMENTS)), flush=True)
    print(markdown([row for seed in options.seeds for row in rows.where(seed=seed)]))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table: one line per kind of memory, every seed shown."""
    lines: dict[str, list[float]] = {}

    def add(name: str, accuracy: float) -> None:
        lines.setdefault(name, []).append(accuracy)

    for row in rows:
        add("the document's own", row["own memory"])
        add("none", row["no memory"])
        for each in row["compressed"]:
            add(f"compressed to rank {each['rank']}", each["accuracy"])
        for each in row["combined"]:
            shared = ", no key in common" if each["disjoint"] else ""
            add(f"of {each['documents']} documents{shared}, {each['how']}", each["accuracy"])
        for each in row["chunks"]:
            how = "in one piece" if each["chunk"] is None else f"in chunks of {each['chunk']}"
            add(f"{each['words']} words {how}", each["accuracy"])
    out = ["| memory | share of exact answers, every seed |", "|---|---|"]
    out += [f"| {name} | {', '.join(f'{value:.3f}' for value in values)} |" for name, values in lines.items()]
    return "\n".join(out)


if __name__ == "__main__":
    main()
