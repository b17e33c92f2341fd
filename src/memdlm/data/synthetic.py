"""Seeded long-context tasks in the spirit of RULER and BABILong, at any length, as chat records.

A sample is a context (facts scattered in filler) with one or more questions about it. The first user turn holds the
context and the first question; further questions are further turns. Tasks speak a small English, or symbols
(`WORDINGS`). What white space separates is one token with `build_word_tokenizer`; for English, with `sentences=True`.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from memdlm.data.wording import WORDINGS, Facts, Wording
from memdlm.errors import DataError, unknown
from memdlm.randomness import derive

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
    wording: str = "english"
    """`english`, or `symbols`, the wording of the recorded studies."""

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise DataError(unknown("wording", self.wording, WORDINGS))

    @property
    def said(self) -> Wording:
        """Return the wording."""
        return WORDINGS[self.wording]

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
        """Return every word a sample can hold, filler included, without punctuation."""
        return sorted({*self.said.filler, *self.vocabulary()})

    def sample(self, generator: torch.Generator, length: int) -> Sample:
        """Draw a sample whose context has exactly `length` words; DataError if the facts alone need more."""
        facts, questions = self.draw(generator, length)
        context = self.said.place(facts, length, generator, self.name)
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


def exact_match(answer: str, predicted: str) -> bool:
    """Whether both texts have the same words, whatever the spacing."""
    return answer.split() == predicted.split()


@final
@dataclass(frozen=True, kw_only=True)
class KeyValueRecall(Task):
    """Records "KEY likes VALUE"; asked "KEY likes", answer its value.

    With `is_adjacent`, "bring KEY VALUE" and "bring KEY": the value next to its key.
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
        """Keys, values and the other words of the record."""
        form = "errand" if self.is_adjacent else "record"
        keys, values = self.said.names("key", self.num_keys), self.said.names("value", self.num_values)
        return [*self.said.words_of(form, f"ask {form}"), *keys, *values]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw different keys with independent values; ask for different keys."""
        form = "errand" if self.is_adjacent else "record"
        keys = choose(self.said.names("key", self.num_keys), self.num_pairs, generator)
        values = pick(self.said.names("value", self.num_values), self.num_pairs, generator)
        asked = torch.randperm(self.num_pairs, generator=generator)[: self.num_questions].tolist()
        facts = [self.said.fact(form, key=key, value=value) for key, value in zip(keys, values, strict=True)]
        return facts, [(self.said.question(f"ask {form}", key=keys[index]), values[index]) for index in asked]


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
        owners, values = self.said.names("owner", self.num_keys * 4), self.said.names("value", self.num_values)
        return [*self.said.words_of("gift", "ask gifts"), *owners, *values]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw keys, give each its values, and shuffle the records."""
        keys = choose(self.said.names("owner", self.num_keys * 4), self.num_keys, generator)
        owners = keys * self.values_per_key
        owners = [owners[index] for index in torch.randperm(len(owners), generator=generator).tolist()]
        values = pick(self.said.names("value", self.num_values), len(owners), generator)
        facts = [self.said.fact("gift", owner=owner, value=value) for owner, value in zip(owners, values, strict=True)]
        questions = [
            (
                self.said.question("ask gifts", owner=key),
                " ".join(value for owner, value in zip(owners, values, strict=True) if owner == key),
            )
            for key in choose(keys, min(self.num_questions, self.num_keys), generator)
        ]
        return facts, questions


@final
@dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
    """Chains "X has V", "Y has what X has"; asked what the last of a chain has, answer the value it started from."""

    name: ClassVar[str] = "variable_tracking"
    num_chains: int = 3
    num_hops: int = 2
    num_values: int = 24

    @property
    def chance(self) -> float:
        """One value out of all."""
        return 1 / self.num_values

    def _variables(self) -> list[str]:
        return self.said.names("variable", 4 * self.num_chains * (self.num_hops + 1))

    def vocabulary(self) -> list[str]:
        """Variables, values and words of the assignment and the question."""
        values = self.said.names("value", self.num_values)
        return [*self.said.words_of("start", "link", "ask variable"), *self._variables(), *values]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw disjoint chains and interleave their assignments, each chain in its own order."""
        links = self.num_hops + 1
        variables = choose(self._variables(), self.num_chains * links, generator)
        values = pick(self.said.names("value", self.num_values), self.num_chains, generator)
        chains, questions = [], []
        for chain, value in enumerate(values):
            names = variables[chain * links : (chain + 1) * links]
            links_of = [self.said.fact("start", variable=names[0], source=value)]
            links_of += [self.said.fact("link", variable=b, source=a) for a, b in itertools.pairwise(names)]
            chains.append(links_of)
            questions.append((self.said.question("ask variable", variable=names[-1]), value))
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
        super().__post_init__()
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
        return [*self.said.words_of("entry", "ask common"), *self.said.names("listed", self.num_words)]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw the words and shuffle their repetitions."""
        everything = self.said.names("listed", self.num_words)
        words = choose(everything, self.num_common + self.num_rare, generator)
        common, rare = words[: self.num_common], words[self.num_common :]
        listed = common * self.common_count + rare * self.rare_count
        facts = [
            self.said.fact("entry", word=listed[index])
            for index in torch.randperm(len(listed), generator=generator).tolist()
        ]
        return facts, [(self.said.question("ask common"), " ".join(sorted(common, key=everything.index)))]


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
        return self.said.names("person", 3 * self.num_people)

    def _places(self) -> list[str]:
        return self.said.names("place", self.num_places)

    def _moves(self, people: list[str], generator: torch.Generator) -> list[tuple[str, str]]:
        """Let everyone move at least once."""
        extra = pick(people, max(0, self.num_moves - len(people)), generator)
        movers = [*people, *extra]
        movers = [movers[index] for index in torch.randperm(len(movers), generator=generator).tolist()]
        return list(zip(movers, pick(self._places(), len(movers), generator), strict=True))


@final
@dataclass(frozen=True, kw_only=True)
class OneFact(_People):
    """ "PERSON went to the PLACE"; asked where someone is, answer where they went last."""

    name: ClassVar[str] = "one_fact"

    def vocabulary(self) -> list[str]:
        """People, places and words of sentence and question."""
        return [*self.said.words_of("move", "ask person"), *self._everyone(), *self._places()]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw moves; ask for different people."""
        people = choose(self._everyone(), self.num_people, generator)
        moves = self._moves(people, generator)
        last = dict(moves)
        asked = choose(people, min(self.num_questions, len(people)), generator)
        facts = [self.said.fact("move", person=who, place=where) for who, where in moves]
        return facts, [(self.said.question("ask person", person=who), last[who]) for who in asked]


@final
@dataclass(frozen=True, kw_only=True)
class TwoFacts(_People):
    """ "PERSON took the THING" and "PERSON went to the PLACE"; asked where a thing is, answer where its owner is."""

    name: ClassVar[str] = "two_facts"

    def _things(self) -> list[str]:
        return self.said.names("thing", 3 * self.num_people)

    def vocabulary(self) -> list[str]:
        """People, things, places and words of the sentences and the question."""
        said = self.said.words_of("move", "take", "ask thing")
        return [*said, *self._everyone(), *self._things(), *self._places()]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Give everyone one thing, at a random time among the moves; ask for different things."""
        people = choose(self._everyone(), self.num_people, generator)
        things = choose(self._things(), self.num_people, generator)
        moves = self._moves(people, generator)
        last = dict(moves)
        facts = [self.said.fact("move", person=who, place=where) for who, where in moves]
        for who, thing in zip(people, things, strict=True):
            place = int(torch.randint(len(facts) + 1, (1,), generator=generator))
            facts.insert(place, self.said.fact("take", person=who, thing=thing))
        owner = dict(zip(things, people, strict=True))
        asked = choose(things, min(self.num_questions, len(things)), generator)
        return facts, [(self.said.question("ask thing", thing=thing), last[owner[thing]]) for thing in asked]


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (KeyValueRecall, MultiValueNeedles, VariableTracking, CommonWords, OneFact, TwoFacts)
}
