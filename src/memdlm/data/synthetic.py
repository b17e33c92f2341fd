"""Seeded long-context tasks in the spirit of RULER and BABILong, at any length, as chat records.

A sample is a context (facts scattered in filler words) with one or more questions about it. The first user turn holds
the context and the first question; further questions are further turns. All text is lower-case words, which are one
token each with `build_word_tokenizer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from memdlm.errors import DataError
from memdlm.randomness import derive

FILLER = (
    *("the", "grass", "is", "green", "and", "sky", "blue", "we", "walk", "home", "slowly"),
    *("under", "old", "trees", "while", "rain", "falls"),
)
"""Words without facts, repeated in this order."""

Facts = list[list[str]]
Questions = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation with its answers, in the order of the assistant turns."""

    messages: list[dict[str, str]]
    answers: tuple[str, ...]
    context: str = ""
    """The text that all questions are about; it precedes the first question."""

    def alone(self) -> list["Sample"]:
        """Return one conversation per question: the context, that question, its answer."""
        return [
            Sample(_turn(f"{self.context} {question}", answer), (answer,), self.context)
            for question, answer in zip(self._questions(), self.answers, strict=True)
        ]

    def without_context(self) -> list[dict[str, str]]:
        """Return the conversation with the context dropped: questions and answers only."""
        pairs = zip(self._questions(), self.answers, strict=True)
        return [message for question, answer in pairs for message in _turn(question, answer)]

    def _questions(self) -> list[str]:
        first, *others = (message["content"] for message in self.messages[::2])
        return [first.removeprefix(self.context).lstrip(), *others]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A family of samples. Subclasses draw facts and questions; this class places and wraps them."""

    name: ClassVar[str]
    num_questions: int = 1

    @property
    @abstractmethod
    def chance(self) -> float:
        """Return the probability that a uniform guess among answers of the right form is exact."""

    @abstractmethod
    def vocabulary(self) -> list[str]:
        """Return every word of facts, questions and answers."""

    @abstractmethod
    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Return facts (lists of words that stay together, in order) and (question, answer) pairs."""

    def words(self) -> list[str]:
        """Return every word a sample can hold, filler included."""
        return sorted({*FILLER, *self.vocabulary()})

    def sample(self, generator: torch.Generator, length: int) -> Sample:
        """Draw a sample whose context has exactly `length` words; DataError if the facts alone need more."""
        facts, questions = self.draw(generator, length)
        context = scatter(facts, length, generator, self.name)
        messages, answers = [], []
        for index, (question, answer) in enumerate(questions):
            text = " ".join([*context, question]) if index == 0 else question
            messages += _turn(text, answer)
            answers.append(answer)
        return Sample(messages, tuple(answers), " ".join(context))

    def records(self, num: int, length: int, seed: int | str) -> list[Sample]:
        """Return `num` samples; sample i depends on (seed, task, length, i) alone."""
        return [self.sample(derive(seed, self.name, length, index), length) for index in range(num)]


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def choose(items: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """Draw `count` different items, in random order; DataError if there are fewer."""
    if count > len(items):
        raise DataError(f"a task needs {count} different words, but has {len(items)}; ask for fewer.")
    return [items[index] for index in torch.randperm(len(items), generator=generator)[:count].tolist()]


def pick(items: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """Draw `count` items, with repetition."""
    return [items[index] for index in torch.randint(len(items), (count,), generator=generator).tolist()]


def scatter(facts: Facts, length: int, generator: torch.Generator, name: str) -> list[str]:
    """Place the facts in order, at uniformly random places, in filler words: `length` words in total."""
    needed = sum(map(len, facts))
    if needed > length:
        raise DataError(f"{name}: the facts need {needed} words, the context has {length}; ask for a longer one.")
    free = length - needed
    cuts = sorted(torch.randint(free + 1, (len(facts),), generator=generator).tolist())
    words, used = [], 0
    start = int(torch.randint(len(FILLER), (1,), generator=generator))
    filler = [FILLER[(start + index) % len(FILLER)] for index in range(free)]
    for cut, fact in zip(cuts, facts, strict=True):
        words += [*filler[used:cut], *fact]
        used = cut
    return [*words, *filler[used:]]


def exact_match(answer: str, predicted: str) -> bool:
    """Whether both texts have the same words, whatever the spacing."""
    return answer.split() == predicted.split()


def _names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


@final
@dataclass(frozen=True, kw_only=True)
class KeyValueRecall(Task):
    """Records "KEY is VALUE"; asked "KEY is", answer its value.

    With `is_adjacent`, "fact KEY VALUE" and "fact KEY": the value next to its key.
    """

    name: ClassVar[str] = "kv"
    num_questions: int = 8
    num_pairs: int = 8
    num_keys: int = 48
    num_values: int = 24
    is_adjacent: bool = False

    @property
    def chance(self) -> float:
        """One value out of all."""
        return 1 / self.num_values

    def vocabulary(self) -> list[str]:
        """Keys, values and the record marker."""
        return ["fact" if self.is_adjacent else "is", *_names("k", self.num_keys), *_names("v", self.num_values)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw different keys with independent values; ask for different keys."""
        keys = choose(_names("k", self.num_keys), self.num_pairs, generator)
        values = pick(_names("v", self.num_values), self.num_pairs, generator)
        asked = torch.randperm(self.num_pairs, generator=generator)[: self.num_questions].tolist()
        cues = [["fact", key] if self.is_adjacent else [key, "is"] for key in keys]
        facts = [[*cue, value] for cue, value in zip(cues, values, strict=True)]
        return facts, [(" ".join(cues[index]), values[index]) for index in asked]


@final
@dataclass(frozen=True, kw_only=True)
class MultiValueNeedles(Task):
    """Several records share a key; asked for it, answer all its values in order of appearance."""

    name: ClassVar[str] = "multi_value"
    num_keys: int = 3
    values_per_key: int = 3
    num_values: int = 24

    @property
    def chance(self) -> float:
        """Return the chance to guess every value."""
        return self.num_values**-self.values_per_key

    def vocabulary(self) -> list[str]:
        """Keys, values and words of the record and the question."""
        return ["number", "of", "all", *_names("n", self.num_keys * 4), *_names("v", self.num_values)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw keys, give each its values, and shuffle the records."""
        keys = choose(_names("n", self.num_keys * 4), self.num_keys, generator)
        owners = keys * self.values_per_key
        owners = [owners[index] for index in torch.randperm(len(owners), generator=generator).tolist()]
        values = pick(_names("v", self.num_values), len(owners), generator)
        facts = [["number", "of", owner, value] for owner, value in zip(owners, values, strict=True)]
        questions = [
            (f"all {key}", " ".join(value for owner, value in zip(owners, values, strict=True) if owner == key))
            for key in choose(keys, min(self.num_questions, self.num_keys), generator)
        ]
        return facts, questions


@final
@dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
    """Chains "let X V", "let Y X"; asked for the last variable of a chain, answer the value it started from."""

    name: ClassVar[str] = "variable_tracking"
    num_chains: int = 3
    num_hops: int = 2
    num_values: int = 24

    @property
    def chance(self) -> float:
        """One value out of all."""
        return 1 / self.num_values

    def _variables(self) -> list[str]:
        return _names("x", 4 * self.num_chains * (self.num_hops + 1))

    def vocabulary(self) -> list[str]:
        """Variables, values and words of the assignment and the question."""
        return ["let", "value", *self._variables(), *_names("v", self.num_values)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw disjoint chains and interleave their assignments, each chain in its own order."""
        links = self.num_hops + 1
        variables = choose(self._variables(), self.num_chains * links, generator)
        values = pick(_names("v", self.num_values), self.num_chains, generator)
        chains, questions = [], []
        for chain, value in enumerate(values):
            names = variables[chain * links : (chain + 1) * links]
            sources = [value, *names[:-1]]
            chains.append([["let", name, source] for name, source in zip(names, sources, strict=True)])
            questions.append((f"value {names[-1]}", value))
        turns = [chain for chain in range(self.num_chains) for _ in range(links)]
        order = [turns[index] for index in torch.randperm(len(turns), generator=generator).tolist()]
        facts = [chains[chain].pop(0) for chain in order]
        asked = torch.randperm(len(questions), generator=generator)[: self.num_questions].tolist()
        return facts, [questions[index] for index in asked]


@final
@dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
    """A list of words, a few of them more frequent; answer the frequent ones, in the order of their names."""

    name: ClassVar[str] = "common_words"
    num_common: int = 2
    num_rare: int = 8
    common_count: int = 4
    rare_count: int = 1
    num_words: int = 40

    def __post_init__(self) -> None:
        if self.rare_count >= self.common_count:
            raise DataError(f"rare_count {self.rare_count} must be less than common_count {self.common_count}.")
        if self.num_questions != 1:
            raise DataError(f"common_words has a single question; num_questions is {self.num_questions}.")

    @property
    def chance(self) -> float:
        """Return the chance of one set of words among all sets of that size."""
        ways = 1.0
        for index in range(self.num_common):
            ways *= (self.num_words - index) / (index + 1)
        return 1 / ways

    def vocabulary(self) -> list[str]:
        """The listed words and the question's."""
        return ["most", "common", *_names("w", self.num_words)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw the words and shuffle their repetitions."""
        everything = _names("w", self.num_words)
        words = choose(everything, self.num_common + self.num_rare, generator)
        common, rare = words[: self.num_common], words[self.num_common :]
        listed = common * self.common_count + rare * self.rare_count
        facts = [[listed[index]] for index in torch.randperm(len(listed), generator=generator).tolist()]
        return facts, [("most common", " ".join(sorted(common, key=everything.index)))]


@dataclass(frozen=True, kw_only=True)
class _People(Task):
    num_people: int = 4
    num_places: int = 12
    num_moves: int = 8

    @property
    def chance(self) -> float:
        """One place out of all."""
        return 1 / self.num_places

    def _everyone(self) -> list[str]:
        return _names("person", 3 * self.num_people)

    def _moves(self, people: list[str], generator: torch.Generator) -> list[tuple[str, str]]:
        """Let everyone move at least once."""
        extra = pick(people, max(0, self.num_moves - len(people)), generator)
        movers = [*people, *extra]
        movers = [movers[index] for index in torch.randperm(len(movers), generator=generator).tolist()]
        return list(zip(movers, pick(_names("place", self.num_places), len(movers), generator), strict=True))


@final
@dataclass(frozen=True, kw_only=True)
class OneFact(_People):
    """ "PERSON went to PLACE"; asked where someone is, answer where they went last."""

    name: ClassVar[str] = "one_fact"

    def vocabulary(self) -> list[str]:
        """People, places and words of sentence and question."""
        return ["went", "to", "where", *self._everyone(), *_names("place", self.num_places)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw moves; ask for different people."""
        people = choose(self._everyone(), self.num_people, generator)
        moves = self._moves(people, generator)
        last = dict(moves)
        asked = choose(people, min(self.num_questions, len(people)), generator)
        return [[who, "went", "to", where] for who, where in moves], [(f"where {who}", last[who]) for who in asked]


@final
@dataclass(frozen=True, kw_only=True)
class TwoFacts(_People):
    """ "PERSON took THING" and "PERSON went to PLACE"; asked where a thing is, answer where its owner went last."""

    name: ClassVar[str] = "two_facts"

    def _things(self) -> list[str]:
        return _names("thing", 3 * self.num_people)

    def vocabulary(self) -> list[str]:
        """People, things, places and words of the sentences and the question."""
        places = _names("place", self.num_places)
        return ["went", "to", "took", "where", *self._everyone(), *self._things(), *places]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Give everyone one thing, at a random time among the moves; ask for different things."""
        people = choose(self._everyone(), self.num_people, generator)
        things = choose(self._things(), self.num_people, generator)
        moves = self._moves(people, generator)
        last = dict(moves)
        facts = [[who, "went", "to", where] for who, where in moves]
        for who, thing in zip(people, things, strict=True):
            place = int(torch.randint(len(facts) + 1, (1,), generator=generator))
            facts.insert(place, [who, "took", thing])
        owner = dict(zip(things, people, strict=True))
        asked = choose(things, min(self.num_questions, len(things)), generator)
        return facts, [(f"where {thing}", last[owner[thing]]) for thing in asked]


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (KeyValueRecall, MultiValueNeedles, VariableTracking, CommonWords, OneFact, TwoFacts)
}
