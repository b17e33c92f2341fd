"""How far from its key may a value stand, for a small network to learn which value belongs to which key?

    python benchmarks/study/distance.py --seeds 0 1 2
    python benchmarks/study/distance.py --seeds 0 1 2 --between 1 2 3 6 --reader_steps 200 --steps 300
    python benchmarks/study/distance.py --seeds 10 --between 2 --targets o_proj --out /tmp/validation.json

Texts hold 8 facts "fact KEY w1 ... wn VALUE", the n words between being the same in every fact, and are gone when they
are asked about. Keys and values can be several words each. The network is the small one of the other studies, whose
token mixing and attention are trained from scratch. A model that knows which values occurred, but not whose each is, is
right about one time in five. With `--reader_steps` the network first learns, without memory, pairs that are the same in
every text: a language model in small, which knows where to look for what a value depends on. Rows are written as they
are measured; those that the file already has are not run again.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from study_rows import Rows

from memdlm.data.synthetic import Questions, Task, pick
from memdlm.data.wording import Facts
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import accuracies, recall_data, run_arm, train_arm, trained

NAMES, FACTS, FILLER = 24, 8, 4


@final
@dataclass(frozen=True, kw_only=True)
class Distant(Task):
    """ "fact KEY w1 ... wn VALUE": asked for everything before the value, answer the value."""

    name: ClassVar[str] = "distant"
    num_questions: int = FACTS
    wording: str = "symbols"
    between: int = 0
    """Words between key and value."""
    key_words: int = 1
    value_words: int = 1
    is_fixed: bool = False
    """Every key has the same value in all texts, so that weights can learn the pairs. Of single words only."""

    @property
    def chance(self) -> float:
        """One value out of all."""
        return float(NAMES) ** -self.value_words

    def vocabulary(self) -> list[str]:
        """Keys, values, the record marker, and what stands between."""
        return ["fact", *self._between, *_names("k"), *_names("v")]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw different keys with independent values."""
        keys: dict[str, None] = {}
        while len(keys) < FACTS:
            keys[" ".join(pick(_names("k"), self.key_words, generator))] = None
        asked = [" ".join(["fact", key, *self._between]) for key in keys]
        values = [" ".join(pick(_names("v"), self.value_words, generator)) for _ in keys]
        if self.is_fixed:
            values = [_FIXED[key] for key in keys]
        order = torch.randperm(FACTS, generator=generator).tolist()
        facts = [f"{question} {value}".split() for question, value in zip(asked, values, strict=True)]
        return facts, [(asked[index], values[index]) for index in order]

    @property
    def _between(self) -> list[str]:
        return [f"w{number}" for number in range(self.between)]


def _names(prefix: str) -> list[str]:
    return [f"{prefix}{number}" for number in range(NAMES)]


_FIXED = {key: f"v{(7 * number + 3) % NAMES}" for number, key in enumerate(_names("k"))}


def plan_of(task: Distant, steps: int) -> RecallPlan:
    """Return the plan; the stride exceeds the distance of a value's last word from its key's first."""
    words = task.key_words + task.between + task.value_words
    return closed_book(
        task=task,
        train_length=FACTS * (1 + words) + FILLER,
        times=(1,),
        steps=steps,
        schedule=((1.0, 1),),
        strides=max(4, words + 1),
        answer_words=task.value_words,
    )


def row_of(task: Distant, steps: int, reader_steps: int, targets: str | None, seed: int) -> dict[str, Any]:
    """Train and measure one network; returns its row."""
    plan = plan_of(task, steps)
    data, config = recall_data(plan), arms(plan)[OURS]
    if targets is not None:
        config = dataclasses.replace(config, inner_target_modules=targets)
    if not reader_steps:
        return {"strides": plan.strides} | run_arm(plan, data, config, seed)
    first = plan_of(dataclasses.replace(task, is_fixed=True), reader_steps)
    begun = time.process_time()
    reader = trained(first, recall_data(first), None, seed).model
    reader_seconds = time.process_time() - begun
    found = train_arm(plan, data, config, seed, model=reader)
    return {
        "strides": plan.strides,
        "reader_cpu_seconds": reader_seconds,
        "cpu_seconds": found.cpu_seconds,
        "accuracy": accuracies(plan, data, found, seed),
        "curve": found.curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--between", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--key_words", type=int, default=1)
    parser.add_argument("--value_words", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--reader_steps", type=int, default=0, help="steps on fixed pairs before, without memory")
    parser.add_argument("--targets", help="projections that get fast weights, instead of the preset's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/distance.json"))
    arguments = parser.parse_args()
    if arguments.reader_steps and (arguments.key_words, arguments.value_words) != (1, 1):
        parser.error(
            f"--reader_steps needs keys and values of one word, not of {arguments.key_words} and "
            f"{arguments.value_words}; leave --key_words and --value_words out."
        )
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    for seed in arguments.seeds:
        for between in arguments.between:
            task = Distant(between=between, key_words=arguments.key_words, value_words=arguments.value_words)
            key = {"between": between, "key_words": task.key_words, "value_words": task.value_words}
            # None, as older rows have neither `reader_steps` nor `targets`.
            key |= {"steps": arguments.steps, "seed": seed, "reader_steps": arguments.reader_steps or None}
            key |= {"targets": arguments.targets}
            if rows.where(**key):
                continue
            found = row_of(task, arguments.steps, arguments.reader_steps, arguments.targets, seed)
            row = rows.add(key | found)
            print(key, [f"{each['accuracy']:.3f}" for each in row["accuracy"]], flush=True)


if __name__ == "__main__":
    main()
