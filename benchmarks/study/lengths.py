"""Does a learned memory hold on texts longer than those it was trained on? With the write gate and without.

    python benchmarks/study/lengths.py --seeds 0 1 2 3 4 5
    python benchmarks/study/lengths.py --validation --seeds 10 11 20 21 --out /tmp/validation.json
    python benchmarks/study/lengths.py --smoke --out /tmp/smoke.json      # everything once, tiny: no result

Two plans: `window` hides the facts by a sliding window, `gone` drops the document after it was written. Per model:
recall at 1 to 256 times the training length (at 256: a quarter of the conversations), in one piece and in chunks;
at 16 times also with the filler in random order, and with a fifth of it replaced by values that belong to no key.
The arm "trained in chunks" writes the longer texts at the end of its training in chunks, too; "trained both ways" has
twice as many of these steps, and every other one writes in chunks. Choices are made with `--validation`, on other
conversations. Rows are written as they are measured; those that the file already has are not run again.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from study_rows import SMOKE, SMOKE_STEPS, Rows, on_validation

from memdlm.data.synthetic import Sample
from memdlm.data.wording import FILLER
from memdlm.evaluation import recall
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import RecallData, Trained, recall_data, train_arm

PLANS = {"window": RecallPlan, "gone": closed_book}
IN_CHUNKS, BOTH_WAYS = "trained in chunks", "trained both ways"
ARMS = (OURS, "no write gate", IN_CHUNKS, BOTH_WAYS)
CHUNKS = (1, 4)
"""Lengths of chunks, as multiples of the training length."""
COMMON: dict[str, Any] = {"chunk_update": "accumulated", "chunk_overlap": 4}
UPDATES: dict[str, dict[str, Any]] = {
    "one after the other": {"chunk_update": "sequential", "chunk_overlap": 0},
    "accumulated, 4 words overlap": COMMON,
}
DISTURBED = 16
"""Multiple of the training length at which the filler is disturbed."""
LONG = 64
"""Beyond this multiple a quarter of the conversations is asked, and chunks are not tried."""


def trained_with(plan: RecallPlan, arm: str) -> MemoryConfig | None:
    """Return the memory that an arm is trained with. A document of the training length fits in one chunk."""
    memories = arms(plan)
    if arm not in (IN_CHUNKS, BOTH_WAYS):
        return memories[arm]
    ours = memories[OURS]
    assert ours is not None
    share = 0.5 if arm == BOTH_WAYS else 1.0
    return dataclasses.replace(ours, chunk_length=plan.train_length, chunk_share=share, **COMMON)


def schedule_of(plan: RecallPlan, arm: str) -> tuple[tuple[float, int], ...]:
    """Return the plan's schedule; a model that is trained both ways has twice as many of its longer steps."""
    if arm != BOTH_WAYS:
        return plan.schedule
    (_, first), *later = [(2 * share, times) for share, times in plan.schedule]
    return ((1 - sum(share for share, _ in later), first), *later)


def disturbed(sample: Sample, index: int, values: list[str]) -> Sample:
    """The same facts and questions, with the filler in random order and a fifth of it replaced by `values`, if any."""
    generator = derive("disturbed", index, len(values))
    words = sample.context.split()
    places = [place for place, word in enumerate(words) if word in FILLER]
    order = torch.randperm(len(places), generator=generator).tolist()
    filler = [words[places[other]] for other in order]
    if values:
        for place in range(0, len(filler), 5):
            filler[place] = values[int(torch.randint(len(values), (), generator=generator))]
    for place, word in zip(places, filler, strict=True):
        words[place] = word
    context = " ".join(words)
    first, *others = sample.messages
    content = first["content"].replace(sample.context, context)
    return Sample([{**first, "content": content}, *others], sample.answers, context)


def strangers(sample: Sample, vocabulary: list[str]) -> list[str]:
    """Values that no fact of the sample has."""
    known = set(sample.context.split())
    return [word for word in vocabulary if word.startswith("v") and word not in known]


def ways(
    plan: RecallPlan, data: RecallData, trained: Trained
) -> Iterator[tuple[str, int, ParametricMemory, list[Sample]]]:
    """Yield (name, multiple of the training length, memory, conversations) of everything that is measured."""
    vocabulary = plan.task.vocabulary()

    written = trained.memory.with_options
    whole = written(chunk_length=None, chunk_overlap=0, chunk_share=1.0)
    for times in plan.times:
        samples = data.by_length[times * plan.train_length]
        yield "one piece", times, whole, samples
        if 1 < times <= LONG:
            for chunk in (plan.train_length * each for each in CHUNKS if each < times):
                for name, options in UPDATES.items():
                    yield f"chunks of {chunk}, {name}", times, written(chunk_length=chunk, **options), samples
        if times == DISTURBED:
            yield "shuffled filler", times, whole, [disturbed(each, i, []) for i, each in enumerate(samples)]
            strange = [disturbed(each, i, strangers(each, vocabulary)) for i, each in enumerate(samples)]
            yield "stray values", times, whole, strange
    yield "memory off", 1, None, data.by_length[plan.train_length * plan.times[0]]


def measure(plan: RecallPlan, data: RecallData, trained: Trained, seed: int) -> list[dict[str, Any]]:
    rows = []
    for way, times, memory, samples in ways(plan, data, trained):
        found = recall(
            trained.model,
            data.tokenizer,
            samples,
            steps=plan.answer_steps,
            batch_size=8 if times > DISTURBED else 32,
            seed=seed,
            memory=memory,
            context=plan.context,
        )
        rows.append({"way": way, "times": times, "accuracy": found.accuracy, "questions": found.questions})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(ARMS),
        help="'trained in chunks', 'trained both ways', or names of the main comparison's arms",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--conversations", type=int, default=32, help="per length, of 8 questions each")
    parser.add_argument("--validation", action="store_true", help="other conversations, for choices")
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny: no result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/lengths.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    for name in arguments.plans:
        times = tuple(each for each in arguments.times if each <= DISTURBED or not arguments.smoke)
        changes = {**SMOKE, "steps": SMOKE_STEPS} if arguments.smoke else {"num_eval": arguments.conversations}
        usual = PLANS[name](times=times, few_from=4 * LONG, **changes)
        if arguments.validation:
            usual = on_validation(usual)
        drawn: dict[Any, RecallData] = {}
        for arm in arguments.arms:
            plan = dataclasses.replace(usual, schedule=schedule_of(usual, arm))
            for seed in arguments.seeds:
                key = {"plan": name, "arm": arm, "seed": seed, "times": arguments.times}
                if rows.where(**key):
                    continue
                if plan.schedule not in drawn:
                    drawn[plan.schedule] = recall_data(plan)
                data = drawn[plan.schedule]
                trained = train_arm(plan, data, trained_with(plan, arm), seed)
                row = {
                    **key,
                    "steps": plan.steps,
                    "schedule": plan.schedule,
                    "cpu_seconds": trained.cpu_seconds,
                    "measured": measure(plan, data, trained, seed),
                    "config": dataclasses.asdict(trained.memory.config),
                }
                rows.add(row)
                print(line(row), flush=True)
    print(markdown(rows.where()))


def line(row: dict[str, Any]) -> str:
    figures = " ".join(f"{each['way']} {each['times']}x {each['accuracy']:.3f}," for each in row["measured"])
    return f"{row['plan']}, {row['arm']}, seed {row['seed']}: {figures} {row['cpu_seconds']:.0f} CPU s"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table: one line per plan, arm and way, every seed shown, the worst last."""
    out = ["| plan | arm | way | times | accuracy of every seed | worst |", "|---" * 6 + "|"]
    lines: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        for each in row["measured"]:
            key = (row["plan"], row["arm"], each["way"], each["times"])
            lines.setdefault(key, []).append(each["accuracy"])
    for key, values in lines.items():
        shown = " ".join(f"{value:.3f}" for value in values)
        out.append(f"| {' | '.join(map(str, key))} | {shown} | {min(values):.3f} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
