"""What a user would do instead of a memory: show the text, keep its keys and values, or fine-tune on it.

    python benchmarks/study/instead.py --search
    python benchmarks/study/instead.py --seeds 30 31 32

The task of the plan whose document is gone: 8 facts, each asked alone. An MDLM of the same size, trained with the text
in sight and no window, answers with the text in its context; with the text's keys and values kept; and, the document
gone, after a fresh LoRA was trained on it by the masked loss (rank and targets of the memory, or all linear layers).
Ours is written once and asked, and asked again from its file. LoRA is asked unmerged, as a memory is.

Per way and length: accuracy (the answer's word; exact also wants the end mark behind it), CPU seconds to write a
document, to read it in a new process and per question, and bytes kept, as medians over documents and questions of one
run. `--search` chooses the learning rates of that MDLM and of LoRA (for each number of steps) on validation seeds and
conversations; its rows stay in the file. Rows are written as they are measured; those that the file already has are not
run again. `--smoke` runs everything in a tiny size; its figures say nothing.
"""

import argparse
import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from study_rows import SMOKE, SMOKE_STEPS, Rows, on_validation
from transformers import PreTrainedModel
from ways import Document, Written, cached, documents, in_context, tuned, written

from memdlm.data.synthetic import Sample
from memdlm.models import LoRAOptions
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import RecallData, Trained, accuracies, recall_data, train_arm

TEXT_RATES = (2e-3, 5e-3, 1e-2)
LORA_RATES = (1e-3, 3e-3, 1e-2)
STEPS = (10, 30, 100, 300)
TARGETS = ("same targets", "all linear layers")
FIRST = "text in the context"
"""What the others are compared with."""


@dataclass
class Bench:
    """Plans, conversations and models of one stage."""

    rows: Rows
    stage: str
    documents: int
    """Asked per length."""
    tuned: int
    """Of those, how many LoRA is trained on."""
    smoke: bool

    def __post_init__(self) -> None:
        self.times = (1, 4) if self.stage == "search" else (1, 4, 16)
        self.steps = (1, 2) if self.smoke else STEPS
        small = SMOKE | {"steps": SMOKE_STEPS, "rank": 2} if self.smoke else {}
        self.plan = closed_book(**({"times": self.times, "num_eval": self.documents} | small))
        if self.stage == "search":
            self.plan = on_validation(self.plan)
        self._data: dict[str, RecallData] = {}

    def data(self, context: str) -> RecallData:
        if context not in self._data:
            self._data[context] = recall_data(self.plan_of(context))
        return self._data[context]

    def plan_of(self, context: str, rate: float | None = None) -> RecallPlan:
        rate = self.plan.learning_rate if rate is None else rate
        return dataclasses.replace(self.plan, context=context, learning_rate=rate)

    def ours(self, seed: int) -> Trained:
        return train_arm(self.plan, self.data("dropped"), arms(self.plan)[OURS], seed)

    def text_model(self, rate: float, seed: int) -> Trained:
        """An MDLM that sees the text, in training and when it is asked."""
        return train_arm(self.plan_of("kept", rate), self.data("kept"), None, seed)

    def lora(self, targets: str, model: PreTrainedModel) -> LoRAOptions:
        config = arms(self.plan)[OURS]
        assert config is not None
        shape = {"r": config.inner_rank, "lora_alpha": config.inner_alpha, "lora_dropout": 0.0}
        if targets != "same targets":
            return LoRAOptions(**shape)
        last = model.config.num_hidden_layers - 1
        return LoRAOptions(target_modules=",".join(f"layers.{last}.mlp.{each}" for each in config.targets), **shape)

    def asked(self, times: int) -> list[Sample]:
        return self.data("dropped").by_length[times * self.plan.train_length]


def search(bench: Bench, seeds: Iterable[int]) -> None:
    """Measure every learning rate on every seed: of the MDLM, then of LoRA on the best of those."""
    rows, models = bench.rows, {}
    for rate in TEXT_RATES:
        for seed in seeds:
            key = {"stage": "search", "what": "text", "rate": rate, "seed": seed}
            if rows.where(**key):
                continue
            models[rate, seed] = trained = bench.text_model(rate, seed)
            found = [a["accuracy"] for a in accuracies(bench.plan_of("kept"), bench.data("kept"), trained, seed)][1::2]
            report(rows.add(key | {"scores": found, "cpu_seconds": trained.cpu_seconds}))
    rate, mask = chosen(rows, what="text"), bench.data("kept").tokenizer.mask_token_id
    for seed in seeds:
        for targets in TARGETS:
            for each in LORA_RATES:
                key = {"stage": "search", "what": "lora", "targets": targets, "rate": each, "seed": seed}
                if rows.where(**key):
                    continue
                if (rate, seed) not in models:
                    models[rate, seed] = bench.text_model(rate, seed)
                model = models[rate, seed].model
                rates, options = dict.fromkeys(bench.steps, each), bench.lora(targets, model)
                found = [
                    one
                    for document in documents(bench.data("kept").tokenizer, bench.asked(1)[: bench.tuned])
                    for one in tuned(model, document, mask, options=options, rates=rates, name="")
                ]
                for count in bench.steps:
                    rights = [a.is_right for one in found if one.way == f", {count} steps" for a in one.answers]
                    report(rows.add(key | {"steps": count, "scores": [statistics.fmean(rights)]}))


def chosen(rows: Rows, **what: Any) -> float:
    """Return the learning rate whose mean over the seeds is best: at 1x, then at 4x, then the smallest."""
    found: dict[float, list[list[float]]] = {}
    for row in rows.where(stage="search", **what):
        found.setdefault(row["rate"], []).append(row["scores"])
    if not found:
        raise SystemExit(f"{rows.path} has no search of {what}; run with --search first.")
    means = {rate: [statistics.fmean(each) for each in zip(*found[rate], strict=True)] for rate in sorted(found)}
    return max(means, key=lambda rate: means[rate])


def ways(
    bench: Bench,
    document: Document,
    text: PreTrainedModel,
    ours: Trained,
    rates: dict[str, dict[int, float]],
    seed: int,
) -> Iterator[Written]:
    """One document in all ways, one after the other: what the machine does meanwhile harms all of them alike."""
    mask = ours.memory.mask_token_id
    yield from in_context(text, document, mask)
    yield from cached(text, document, mask)
    yield from written(ours.memory, document, seed)
    if document.index < bench.tuned:
        # Without a step: what the MDLM guesses when it has never seen the document.
        nothing = {0: LORA_RATES[0]}
        yield from tuned(text, document, mask, options=bench.lora(TARGETS[0], text), rates=nothing, name="LoRA")
        for targets, each in rates.items():
            options = bench.lora(targets, text)
            yield from tuned(text, document, mask, options=options, rates=each, name=f"LoRA, {targets}")


def test(bench: Bench, seed: int) -> None:
    due = [times for times in bench.times if not bench.rows.where(stage="test", seed=seed, times=times)]
    if not due:
        return
    rates = {
        targets: {count: chosen(bench.rows, what="lora", targets=targets, steps=count) for count in bench.steps}
        for targets in TARGETS
    }
    rate = chosen(bench.rows, what="text")
    text, ours = bench.text_model(rate, seed), bench.ours(seed)
    for times in due:
        found: dict[str, list[Written]] = {}
        every = list(documents(bench.data("kept").tokenizer, bench.asked(times)))
        # The first document is done twice: what Python loads on the way is not counted.
        for index, document in enumerate([every[0], *every]):
            for one in ways(bench, document, text.model, ours, rates, seed):
                if index:
                    found.setdefault(one.way, []).append(one)
        bench.rows.add(
            {
                "stage": "test",
                "seed": seed,
                "times": times,
                "text_rate": rate,
                "lora_rates": rates,
                "cpu_seconds": {"MDLM": text.cpu_seconds, "ours": ours.cpu_seconds},
                "ways": {way: summary(each) for way, each in found.items()},
            }
        )
        print(f"seed {seed}, {times}x done", flush=True)


def summary(found: list[Written]) -> dict[str, float]:
    """Return shares of the questions, and medians over documents and over questions."""
    answers = [answer for one in found for answer in one.answers]
    return {
        "documents": len(found),
        "questions": len(answers),
        "accuracy": statistics.fmean(answer.is_right for answer in answers),
        "exact": statistics.fmean(answer.is_exact for answer in answers),
        "write_seconds": statistics.median(one.write_seconds for one in found),
        "read_seconds": statistics.median(one.read_seconds for one in found),
        "question_seconds": statistics.median(answer.seconds for answer in answers),
        "bytes": statistics.median(one.num_bytes for one in found),
    }


def pays_from(row: dict[str, float], first: dict[str, float]) -> float:
    """Return from how many questions on a way costs less than showing the text each time; infinity: never."""
    once, saved = row["write_seconds"] + row["read_seconds"], first["question_seconds"] - row["question_seconds"]
    return math.floor(once / saved) + 1 if saved > 0 else math.inf


def report(row: dict[str, Any]) -> None:
    name = ", ".join(str(row[key]) for key in ("what", "targets", "steps") if key in row)
    print(f"{name}, rate {row['rate']}, seed {row['seed']}:", *(f"{each:.3f}" for each in row["scores"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="choose learning rates on validation")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32], help="of the test")
    parser.add_argument("--documents", type=int, default=32, help="per length, of 8 questions each")
    parser.add_argument("--tuned", type=int, default=8, help="of those, the first so many are fine-tuned on")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, search and test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/instead.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    seeds = (arguments.search_seeds[:1], arguments.seeds[:1])
    searched, tested = seeds if arguments.smoke else (arguments.search_seeds, arguments.seeds)
    if arguments.search or arguments.smoke:
        search(Bench(rows, "search", arguments.documents, arguments.tuned, arguments.smoke), searched)
    if arguments.smoke or not arguments.search:
        bench = Bench(rows, "test", arguments.documents, arguments.tuned, arguments.smoke)
        for seed in tested:
            test(bench, seed)
    print(markdown(rows))


def markdown(rows: Rows) -> str:
    """Return a table: one line per length and way; every seed's accuracy, and medians over the seeds of the rest.

    A question's cost is also given as a multiple of one with the text in sight, and with it the number of questions
    from which on a way costs less, writing and reading included; all ratios within one run.
    """
    heads = ["times", "way", "accuracy", "exact", "write, ms", "read, ms", "question, ms", "of the text's", "pays from"]
    out = [f"| {' | '.join([*heads, 'bytes'])} |", "|---" * (len(heads) + 1) + "|"]
    tested = rows.where(stage="test")
    for times in sorted({row["times"] for row in tested}):
        own = [row["ways"] for row in tested if row["times"] == times]
        for way in dict.fromkeys(way for each in own for way in each):
            pairs = [(each[way], each[FIRST]) for each in own if way in each]
            scores = [", ".join(f"{each[name]:.3f}" for each, _ in pairs) for name in ("accuracy", "exact")]
            costs = [
                f"{1e3 * statistics.median(each[f'{name}_seconds'] for each, _ in pairs):.1f}"
                for name in ("write", "read", "question")
            ]
            ratio = statistics.median(each["question_seconds"] / first["question_seconds"] for each, first in pairs)
            starts = statistics.median(pays_from(*pair) for pair in pairs)
            size = statistics.median(each["bytes"] for each, _ in pairs)
            # Where nothing was written there is nothing to pay.
            is_free = all(each["write_seconds"] == 0 for each, _ in pairs)
            shown = "" if is_free else ("never" if math.isinf(starts) else f"{starts:.0f}")
            out.append(f"| {times} | {way} | {' | '.join([*scores, *costs])} | {ratio:.2f} | {shown} | {size:.0f} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
