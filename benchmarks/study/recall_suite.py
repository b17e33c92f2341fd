"""A suite of recall tasks for a memory that learns to be written: what it can hold, and in which form.

Each task is trained on its own, with attention that does not reach from a question to its fact. Facts are of the forms
that the study of the method tried: more of them, keys and values of two words, words between key and value, several
values per key, and chains.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from memdlm.data.synthetic import KeyValueRecall, Questions, Task, choose, pick
from memdlm.data.wording import FILLER, Facts
from memdlm.workflows.studies.plans import UNWEIGHTED, RecallPlan

EVEN = UNWEIGHTED | {"stratified_times": True}
"""Changes of the training arguments under which a step's gradient varies least."""


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


@final
@dataclass(frozen=True, kw_only=True)
class TwoWordRecall(Task):
    """ "fact A B V W": key and value of two words each, from four by four; no word of a key tells the key."""

    name: ClassVar[str] = "two_words"
    num_questions: int = 8
    wording: str = "symbols"
    num_pairs: int = 8
    alphabet: int = 4

    @property
    def chance(self) -> float:
        """One value of two words out of all."""
        return self.alphabet**-2

    def vocabulary(self) -> list[str]:
        """Two alphabets for keys, two for values."""
        return ["fact", *(word for prefix in "abvw" for word in _names(prefix, self.alphabet))]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw different keys with independent values."""
        every = [f"{a} {b}" for a in _names("a", self.alphabet) for b in _names("b", self.alphabet)]
        keys = choose(every, self.num_pairs, generator)
        first, second = (pick(_names(prefix, self.alphabet), self.num_pairs, generator) for prefix in "vw")
        facts = [["fact", *key.split(), v, w] for key, v, w in zip(keys, first, second, strict=True)]
        asked = torch.randperm(self.num_pairs, generator=generator)[: self.num_questions].tolist()
        return facts, [(f"fact {keys[index]}", f"{first[index]} {second[index]}") for index in asked]


@final
@dataclass(frozen=True, kw_only=True)
class GapRecall(Task):
    """ "fact KEY [filler] VALUE": up to `max_gap` filler words between key and value, none in the question."""

    name: ClassVar[str] = "gap"
    num_questions: int = 8
    wording: str = "symbols"
    num_pairs: int = 8
    num_keys: int = 24
    num_values: int = 24
    max_gap: int = 1

    @property
    def chance(self) -> float:
        """One value out of all."""
        return 1 / self.num_values

    def vocabulary(self) -> list[str]:
        """Keys, values and the record marker."""
        return ["fact", *_names("k", self.num_keys), *_names("v", self.num_values)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw different keys with independent values and independent gaps."""
        keys = choose(_names("k", self.num_keys), self.num_pairs, generator)
        values = pick(_names("v", self.num_values), self.num_pairs, generator)
        gaps = torch.randint(self.max_gap + 1, (self.num_pairs,), generator=generator).tolist()
        facts = [
            ["fact", key, *pick(FILLER, gap, generator), value]
            for key, value, gap in zip(keys, values, gaps, strict=True)
        ]
        asked = torch.randperm(self.num_pairs, generator=generator)[: self.num_questions].tolist()
        return facts, [(f"fact {keys[index]}", values[index]) for index in asked]


@final
@dataclass(frozen=True, kw_only=True)
class SeveralValues(Task):
    """ "fact KEY VALUE", two facts per key; asked for it, answer both values in the order of their names."""

    name: ClassVar[str] = "several_values"
    num_questions: int = 4
    wording: str = "symbols"
    num_keys_asked: int = 4
    num_keys: int = 24
    num_values: int = 24

    @property
    def chance(self) -> float:
        """One set of two values out of all."""
        return 2 / (self.num_values * (self.num_values - 1))

    def vocabulary(self) -> list[str]:
        """Keys, values and the record marker."""
        return ["fact", *_names("k", self.num_keys), *_names("v", self.num_values)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw keys, give each two different values, and shuffle the facts."""
        keys = choose(_names("k", self.num_keys), self.num_keys_asked, generator)
        every = _names("v", self.num_values)
        values = {key: sorted(choose(every, 2, generator), key=every.index) for key in keys}
        facts = [["fact", key, value] for key in keys for value in values[key]]
        facts = [facts[index] for index in torch.randperm(len(facts), generator=generator).tolist()]
        asked = choose(keys, min(self.num_questions, len(keys)), generator)
        return facts, [(f"fact {key}", " ".join(values[key])) for key in asked]


@final
@dataclass(frozen=True, kw_only=True)
class Chain(Task):
    """ "let X V", "let Y X"; asked for Y, answer V (one hop), or with `shows_path` first X, then V."""

    name: ClassVar[str] = "chain"
    num_questions: int = 4
    wording: str = "symbols"
    num_chains: int = 4
    num_variables: int = 24
    num_values: int = 24
    shows_path: bool = True

    @property
    def chance(self) -> float:
        """One value out of all, and one variable."""
        return 1 / (self.num_values * (self.num_variables if self.shows_path else 1))

    def vocabulary(self) -> list[str]:
        """Variables, values and the record marker."""
        return ["let", *_names("x", self.num_variables), *_names("v", self.num_values)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw disjoint chains of two links and shuffle all links."""
        names = choose(_names("x", self.num_variables), 2 * self.num_chains, generator)
        values = pick(_names("v", self.num_values), self.num_chains, generator)
        chains = list(zip(names[::2], names[1::2], values, strict=True))
        facts = [["let", first, value] for first, _, value in chains] + [["let", last, x] for x, last, _ in chains]
        facts = [facts[index] for index in torch.randperm(len(facts), generator=generator).tolist()]
        asked = torch.randperm(len(chains), generator=generator)[: self.num_questions].tolist()
        return facts, [
            (f"let {last}", f"{first} {value}" if self.shows_path else value)
            for first, last, value in (chains[index] for index in asked)
        ]


def many_facts(count: int, rank: int, steps: int = 400) -> RecallPlan:
    """Return the plan for `count` facts in 4.5 words of context each."""
    task = KeyValueRecall(wording="symbols", num_pairs=count, num_keys=48, num_questions=16, is_adjacent=True)
    length = count * 9 // 2
    return RecallPlan(
        task=task, train_length=length, times=(1, 4), rank=rank, steps=steps, num_train=32 * steps, training=EVEN
    )


def suite() -> dict[str, RecallPlan]:
    """Return the tasks with the settings that the study found for them.

    Every masked token counts alike in their loss, and times are spread evenly: with the bound's weight 1/t many facts
    take several times the steps.
    """
    longer: dict[str, Any] = {"times": (1, 4), "steps": 300, "num_train": 9600, "training": EVEN}
    return {
        "16 facts, rank 16": many_facts(16, 16),
        "32 facts, rank 8": many_facts(32, 8),
        "32 facts, rank 32": many_facts(32, 32),
        "two-word keys and values, stride 2": RecallPlan(
            task=TwoWordRecall(), train_length=52, strides=2, answer_words=2, **longer
        ),
        "two-word keys and values, stride 4": RecallPlan(
            task=TwoWordRecall(), train_length=52, strides=4, answer_words=2, **longer
        ),
        "filler between, stride 2": RecallPlan(task=GapRecall(), train_length=44, strides=2, **longer),
        "filler between, stride 3": RecallPlan(task=GapRecall(), train_length=44, strides=3, **longer),
        "several values per key": RecallPlan(task=SeveralValues(), rank=32, answer_words=2, **longer),
        "chain, path decoded": RecallPlan(task=Chain(), answer_words=2, **longer),
        "chain, one hop": RecallPlan(task=Chain(shows_path=False), **longer),
    }
