"""The words in which the synthetic tasks speak: a small English, or symbols.

Both say the same things. A wording has a form per fact and per question, names for what the facts are about, and filler
that says nothing.
"""

import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from memdlm.errors import DataError

Facts = list[list[str]]
"""Words that stay together, in order."""
FILLER = (
    *("the", "grass", "is", "green", "and", "sky", "blue", "we", "walk", "home", "slowly"),
    *("under", "old", "trees", "while", "rain", "falls"),
)
"""Filler of symbols, repeated in this order."""

PEOPLE = (
    *("Hugo", "Anna", "Otto", "Clara", "Ben", "Emma", "Felix", "Ida", "Jonas", "Lena", "Max", "Nora"),
    *("Paul", "Rosa", "Simon", "Tilda", "Victor", "Wilma", "Adam", "Bella", "Carl", "Dora", "Erik", "Frida"),
    *("Georg", "Hanna", "Ivan", "Julia", "Karl", "Laura", "Martin", "Nina", "Oscar", "Petra", "Robert", "Sofia"),
    *("Thomas", "Ursula", "Walter", "Zoe", "Albert", "Betty", "Conrad", "Daisy", "Edgar", "Fanny", "Gustav", "Helen"),
)
GOODS = (
    *("candles", "tea", "bread", "apples", "flowers", "honey", "soap", "letters", "plums", "cheese", "paper", "nuts"),
    *("coffee", "pears", "salt", "eggs", "maps", "butter", "lemons", "rice", "soup", "grapes", "jam", "pencils"),
    *("beans", "berries", "biscuits", "cake", "cards", "carrots", "cherries", "chocolate", "cream", "figs", "flour"),
    *("juice", "melons", "milk", "mushrooms", "mustard", "oil", "olives", "onions", "oranges", "peas", "potatoes"),
    *("salad", "sugar"),
)
PLACES = (
    *("kitchen", "garden", "cellar", "attic", "office", "school", "station", "market", "library", "bakery", "harbour"),
    *("church", "stable", "workshop", "cinema", "museum", "bathroom", "hallway", "barn", "theatre", "pharmacy"),
    *("tower", "bridge", "hotel"),
)
THINGS = (
    *("candle", "book", "lamp", "hammer", "basket", "umbrella", "bottle", "coat", "key", "clock", "ball", "drum"),
    *("mirror", "pillow", "rope", "shovel", "spoon", "suitcase", "ticket", "violin", "camera", "blanket", "bucket"),
    *("knife",),
)
SENTENCES = tuple(
    sentence.split()
    for sentence in (
        *("the grass is green", "we walk home slowly", "rain falls on the roof", "old trees grow here"),
        *("a dog sleeps outside", "the street is quiet", "birds sing in spring", "our train was late"),
        *("nobody heard the bell", "it was a long day", "snow lies on the hills", "the window stays open"),
    )
)
"""Filler of English, repeated in this order."""
ENDS = tuple(sentence.split() for sentence in ("", "good", "rain falls", "we walk home", "the sky is blue"))
"""By number of words: what fills the rest of a text."""


@dataclass(frozen=True)
class Wording(ABC):
    """How a task's facts, questions and filler are said."""

    name: ClassVar[str]
    forms: ClassVar[Mapping[str, str]]
    """What is said, with a field in braces for each name."""

    @abstractmethod
    def names(self, kind: str, count: int) -> list[str]:
        """Return `count` different names of a kind: key, value, owner, variable, listed, person, place, thing."""

    @property
    @abstractmethod
    def filler(self) -> list[str]:
        """Return the words of the filler."""

    @abstractmethod
    def place(self, facts: Facts, length: int, generator: torch.Generator, task: str) -> list[str]:
        """Scatter facts, in order, in filler: `length` words in total; DataError if the facts alone need more."""

    def fact(self, form: str, **names: str) -> list[str]:
        """Return the words of a fact."""
        return self.forms[form].format(**names).split()

    def question(self, form: str, **names: str) -> str:
        """Return a question."""
        return self.forms[form].format(**names)

    def words_of(self, *forms: str) -> list[str]:
        """Return the words of forms that are no names, without punctuation and in small letters."""
        parsed = [text for form in forms for text, *_ in string.Formatter().parse(self.forms[form])]
        return [word for text in parsed for word in text.lower().replace("?", "").split()]


@final
@dataclass(frozen=True)
class English(Wording):
    """ "Bring Hugo candles. The grass is green." Facts and filler are sentences."""

    name: ClassVar[str] = "english"
    forms: ClassVar[Mapping[str, str]] = {
        "record": "{key} likes {value}",
        "ask record": "{key} likes",
        "errand": "bring {key} {value}",
        "ask errand": "Bring {key}",
        "gift": "we gave {owner} {value}",
        "ask gifts": "All for {owner}",
        "start": "{variable} has {source}",
        "link": "{variable} has what {source} has",
        "ask variable": "{variable} has",
        "entry": "{word}",
        "ask common": "Most common",
        "move": "{person} went to the {place}",
        "take": "{person} took the {thing}",
        "ask person": "Where is {person}?",
        "ask thing": "Where is the {thing}?",
    }
    kinds: ClassVar[Mapping[str, Sequence[str]]] = {
        **dict.fromkeys(("key", "owner", "variable", "person"), PEOPLE),
        **dict.fromkeys(("value", "listed"), GOODS),
        "place": PLACES,
        "thing": THINGS,
    }

    def names(self, kind: str, count: int) -> list[str]:
        """Return names from a list; beyond its end it begins again, with a number behind each: "Hugo2"."""
        known = self.kinds[kind]
        rounds = [divmod(index, len(known)) for index in range(count)]
        found = [f"{known[place]}{turn + 1 if turn else ''}" for turn, place in rounds]
        # A list of words is asked for in alphabetical order.
        return sorted(found) if kind == "listed" else found

    @property
    def filler(self) -> list[str]:
        """Return the words of all sentences."""
        return [word for sentence in (*SENTENCES, *ENDS) for word in sentence]

    def place(self, facts: Facts, length: int, generator: torch.Generator, task: str) -> list[str]:
        """Put every fact between two sentences of filler, all places alike."""
        free = _free(facts, length, task)
        start = int(torch.randint(len(SENTENCES), (1,), generator=generator))
        others: list[list[str]] = []
        while free >= len(ENDS):
            others.append(SENTENCES[(start + len(others)) % len(SENTENCES)])
            free -= len(others[-1])
        if free:
            others.append(ENDS[free])
        cuts = sorted(torch.randint(len(others) + 1, (len(facts),), generator=generator).tolist())
        sentences: list[list[str]] = []
        used = 0
        for cut, fact in zip(cuts, facts, strict=True):
            sentences += [*others[used:cut], fact]
            used = cut
        return [word for sentence in (*sentences, *others[used:]) for word in _written(sentence)]


@final
@dataclass(frozen=True)
class Symbols(Wording):
    """ "fact k3 v17", in the middle of filler words. The wording of the recorded studies."""

    name: ClassVar[str] = "symbols"
    forms: ClassVar[Mapping[str, str]] = {
        "record": "{key} is {value}",
        "ask record": "{key} is",
        "errand": "fact {key} {value}",
        "ask errand": "fact {key}",
        "gift": "number of {owner} {value}",
        "ask gifts": "all {owner}",
        "start": "let {variable} {source}",
        "link": "let {variable} {source}",
        "ask variable": "value {variable}",
        "entry": "{word}",
        "ask common": "most common",
        "move": "{person} went to {place}",
        "take": "{person} took {thing}",
        "ask person": "where {person}",
        "ask thing": "where {thing}",
    }
    letters: ClassVar[Mapping[str, str]] = {"key": "k", "value": "v", "owner": "n", "variable": "x", "listed": "w"}

    def names(self, kind: str, count: int) -> list[str]:
        """Return a letter or a word with numbers: "k0", "place3"."""
        return [f"{self.letters.get(kind, kind)}{index}" for index in range(count)]

    @property
    def filler(self) -> list[str]:
        """Return the filler words."""
        return list(FILLER)

    def place(self, facts: Facts, length: int, generator: torch.Generator, task: str) -> list[str]:
        """Put every fact between two words of filler, all places alike."""
        return scatter(facts, length, generator, task)


WORDINGS: dict[str, Wording] = {each.name: each for each in (English(), Symbols())}


def scatter(facts: Facts, length: int, generator: torch.Generator, name: str) -> list[str]:
    """Place the facts in order, at uniformly random places, in filler words: `length` words in total."""
    free = _free(facts, length, name)
    cuts = sorted(torch.randint(free + 1, (len(facts),), generator=generator).tolist())
    words, used = [], 0
    start = int(torch.randint(len(FILLER), (1,), generator=generator))
    filler = [FILLER[(start + index) % len(FILLER)] for index in range(free)]
    for cut, fact in zip(cuts, facts, strict=True):
        words += [*filler[used:cut], *fact]
        used = cut
    return [*words, *filler[used:]]


def _free(facts: Facts, length: int, name: str) -> int:
    needed = sum(map(len, facts))
    if needed > length:
        raise DataError(f"{name}: the facts need {needed} words, the context has {length}; ask for a longer one.")
    return length - needed


def _written(sentence: Sequence[str]) -> list[str]:
    """Return a sentence with a capital letter and a full stop."""
    first, *others = sentence
    words = [first[:1].upper() + first[1:], *others]
    return [*words[:-1], f"{words[-1]}."]
