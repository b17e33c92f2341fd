"""A small natural English: who keeps what where, who works as what, who gave what to whom, colours and times.

Names are built from syllables, objects are plain nouns with or without a material, events are two words. Each of them
belongs to one of three parts (train, validation, test), so that those of a test document occur in no training document.
Places, jobs, colours and times are shared by all parts: they are answers, and it is their owner that is new. Every kind
of sentence has several wordings, and its questions use other words than the text.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from pages import GappedText, Page, Question

PARTS = ("train", "validation", "test")
KINDS = ("place", "job", "gift", "colour", "time")
Draw = Callable[[random.Random, "Words", set[str]], "Fact"]


def _listed(text: str) -> list[str]:
    return text.split()


ONSETS = _listed("b br c d dr f g gr h j k l m n p r s st t tr v w")
VOWELS = _listed("a e i o u ai ia")
NOUNS = _listed(
    "anchor apron axe bag ball banjo barrel basket bell belt bench bicycle blanket boat book boot bottle bowl box "
    "bracelet bread brick broom brush bucket button cage cake camera candle cane cap carpet cart chain chair chest "
    "clock cloth coat coin comb compass cradle crown cup curtain cushion desk dish doll door drawer dress drum engine "
    "envelope fan feather fence fiddle flag flute fork frame glass globe glove goblet hammer harp hat helmet hook horn "
    "jacket jar jug kettle key kite knife ladder lamp lantern letter lock loom map mask mat medal mirror mitten mug "
    "nail necklace needle net oar organ oven paddle pan parcel pen pencil pepper piano pillow pin pipe pitcher plate "
    "plough pot printer puppet purse puzzle quilt racket radio rake razor ribbon ring robe rope rug saddle sail saw "
    "scarf scissors shawl shelf shield shirt shoe shovel sieve skirt sled slipper spade spoon stamp statue stool stove "
    "suitcase sword table telescope tent thread ticket tool towel toy tray trumpet trunk umbrella vase violin wagon "
    "wallet watch wheel whip whistle wig window wreath"
)
MATERIALS = _listed("brass clay copper glass iron leather paper silver stone tin wooden woollen")
PLACES = _listed(
    "attic bakery balcony barn basement bathroom bedroom cabin canteen castle cellar chapel church cottage courtyard "
    "dairy factory farmhouse forge garage garden greenhouse hallway harbour hospital hotel hut inn kitchen laboratory "
    "laundry library lighthouse loft market mill museum nursery office orchard palace pantry parlour pharmacy porch "
    "prison school shed shop stable station studio theatre tower tunnel village warehouse winery workshop yard"
)
JOBS = _listed(
    "actor architect baker barber blacksmith bookbinder butcher carpenter chemist clerk cobbler conductor cook dancer "
    "dentist diver doctor driver engineer farmer fisher gardener glazier guard guide hunter jeweller joiner judge "
    "lawyer librarian locksmith mason mechanic merchant midwife miller miner musician nurse painter pilot plumber poet "
    "porter potter printer roofer sailor scholar sculptor shepherd singer soldier surgeon tailor tanner teacher "
    "translator waiter weaver welder writer"
)
COLOURS = _listed(
    "black blue brown cream crimson gold green grey lilac orange pink purple red scarlet violet white yellow"
)
SHADES = ("", "", "dark ", "light ", "pale ")
HOURS = _listed("one two three four five six seven eight nine ten eleven")
DAYS = _listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
OCCASIONS = _listed(
    "apple autumn barley cattle charity coal cotton dance flower forest fruit harvest honey horse island lantern maple "
    "memory mountain music night ocean pepper pony poetry potato pumpkin river rose salt silk spring summer swimming "
    "tea valley walnut water wine winter wool"
)
EVENTS = _listed("auction concert contest exam fair feast festival game lecture lesson meeting parade play race trial")
FILLER = (
    "It rained a little in the afternoon.",
    "Nobody could say why.",
    "The road was long and quiet.",
    "A dog slept near the fire.",
    "People talked about the weather.",
    "That surprised no one.",
    "The old bridge was closed again.",
    "Everything else stayed as it was.",
    "There was a smell of fresh coffee.",
    "Birds were singing in the trees.",
    "Somebody laughed in the next room.",
    "It had been a busy week.",
    "The children were already asleep.",
    "Most of the neighbours knew this.",
)
CLOZE = "Complete: "
"""Begins a question in the text's own words, which only training asks."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One sentence, what can be asked about it in other words, and where its answer stands."""

    kind: str
    sentence: str
    question: str
    answer: str
    whose: str
    """Person or event that the sentence is about."""

    def cloze(self) -> Question:
        """Return the sentence up to its answer as a question."""
        return Question(f"{self.kind} cloze", CLOZE + self.around()[0], self.answer)

    def asked(self, document: "Sequence[Fact]" = ()) -> Question:
        """Return the question; answers of the document's other facts of its kind can be chosen instead."""
        others = [each.answer for each in document if each.kind == self.kind and each is not self]
        return Question(self.kind, self.question, self.answer, others)

    def around(self) -> tuple[str, str]:
        """Return what stands before the answer and after it."""
        start = self.sentence.rindex(f" {self.answer}")
        return self.sentence[:start], self.sentence[start + 1 + len(self.answer) :]

    def about(self) -> "Fact":
        """Return an exercise in reading: the same, but the answer is whose fact it is, which has been said."""
        return dataclasses.replace(self, sentence=f" {self.whose}".join(self.around()), answer=self.whose)


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """The words that belong to one part."""

    first_names: Sequence[str]
    surnames: Sequence[str]
    nouns: Sequence[str]
    events: Sequence[str]


def _syllables(ends: Sequence[str]) -> list[str]:
    return [onset + vowel + end for onset in ONSETS for vowel in VOWELS for end in ends]


def _shared_out(words: Sequence[str], name: str) -> dict[str, list[str]]:
    """Share the words out: a tenth for validation, a tenth for the test."""
    shuffled = list(words)
    random.Random(name).shuffle(shuffled)
    tenth = len(shuffled) // 10
    return {"validation": shuffled[:tenth], "test": shuffled[tenth : 2 * tenth], "train": shuffled[2 * tenth :]}


@cache
def words_of(part: str) -> Words:
    """Return the words of a part."""
    heads, tails = _syllables([""]), _syllables(["", "l", "n", "r", "s"])
    roots, ends = _syllables(["l", "n", "r"]), ("berg", "by", "dale", "ford", "ham", "ley", "man", "sen", "son", "ton")
    taken = random.Random("names")
    first = sorted({(taken.choice(heads) + taken.choice(tails)).capitalize() for _ in range(5000)})
    last = sorted({(root + end).capitalize() for root in roots for end in ends})
    events = [f"{occasion} {event}" for occasion in OCCASIONS for event in EVENTS]
    return Words(
        first_names=_shared_out(first, "first names")[part],
        surnames=_shared_out(last, "surnames")[part],
        nouns=_shared_out(NOUNS, "nouns")[part],
        events=_shared_out(events, "events")[part],
    )


def _new(draw: random.Random, words: Sequence[str], used: set[str]) -> str:
    """Draw a word that the document does not have yet."""
    word = draw.choice([each for each in draw.sample(words, min(len(words), 40)) if each not in used])
    used.add(word)
    return word


def _thing(draw: random.Random, words: Words, used: set[str]) -> str:
    noun = _new(draw, words.nouns, used)
    return f"{draw.choice(MATERIALS)} {noun}" if draw.random() < 0.3 else noun


def _pick(draw: random.Random, texts: Sequence[str], **words: str) -> str:
    return draw.choice(texts).format(**words)


def _place(draw: random.Random, words: Words, used: set[str]) -> Fact:
    who, what = _new(draw, words.first_names, used), _thing(draw, words, used)
    where = draw.choice(PLACES)
    texts = (
        "{who} keeps the {what} in the {where}.",
        "{who} left the {what} in the {where}.",
        "The {what} of {who} stands in the {where}.",
    )
    asked = (
        "Where would you find the {what} that belongs to {who}?",
        "In which place is {who}'s {what} now?",
        "Someone is looking for the {what} that {who} owns. Where is it?",
    )
    said = {"who": who, "what": what}
    return Fact("place", _pick(draw, texts, **said, where=where), _pick(draw, asked, **said), where, who)


def _job(draw: random.Random, words: Words, used: set[str]) -> Fact:
    who, job = _new(draw, words.first_names, used), draw.choice(JOBS)
    texts = (
        "{who} works as a {job}.",
        "{who} has become a {job}.",
        "For many years {who} has been a {job}.",
    )
    asked = (
        "What does {who} do for a living?",
        "How does {who} earn money?",
        "Which profession was chosen by {who}?",
    )
    return Fact("job", _pick(draw, texts, who=who, job=job), _pick(draw, asked, who=who), job, who)


def _gift(draw: random.Random, words: Words, used: set[str]) -> Fact:
    who, what = _new(draw, words.first_names, used), _thing(draw, words, used)
    whom = f"{_new(draw, words.first_names, used)} {_new(draw, words.surnames, used)}"
    texts = (
        "{who} gave the {what} to {whom}.",
        "{who} sold the {what} to {whom}.",
        "The {what} of {who} went to {whom}.",
    )
    asked = (
        "Who got the {what} from {who}?",
        "Whose is the {what} that {who} once had?",
        "Who is the new owner of {who}'s {what}?",
    )
    said = {"who": who, "what": what}
    return Fact("gift", _pick(draw, texts, **said, whom=whom), _pick(draw, asked, **said), whom, who)


def _colour(draw: random.Random, words: Words, used: set[str]) -> Fact:
    who, what = _new(draw, words.first_names, used), _thing(draw, words, used)
    colour = draw.choice(SHADES) + draw.choice(COLOURS)
    texts = (
        "{who} painted the {what} {colour}.",
        "The {what} of {who} is {colour}.",
        "The {what} that {who} bought was {colour}.",
    )
    asked = (
        "What colour does {who}'s {what} have?",
        "How would you describe the colour of the {what} that {who} has?",
        "Which colour is the {what} that belongs to {who}?",
    )
    said = {"who": who, "what": what}
    return Fact("colour", _pick(draw, texts, **said, colour=colour), _pick(draw, asked, **said), colour, who)


def _time(draw: random.Random, words: Words, used: set[str]) -> Fact:
    event = _new(draw, words.events, used)
    ways = ("at {hour} on {day}", "on {day} at {hour}", "on {day}", "at {hour}", "at half past {hour}")
    when = _pick(draw, ways, hour=draw.choice(HOURS), day=draw.choice(DAYS))
    texts = ("The {event} starts {when}.", "The {event} will begin {when}.", "They open the {event} {when}.")
    asked = (
        "When does the {event} take place?",
        "At what time should one come to the {event}?",
        "For when is the {event} planned?",
    )
    return Fact("time", _pick(draw, texts, event=event, when=when), _pick(draw, asked, event=event), when, event)


DRAWS: dict[str, Draw] = dict(zip(KINDS, (_place, _job, _gift, _colour, _time), strict=True))


def page(
    part: str,
    index: int,
    *,
    facts: int,
    filler: int = 0,
    cloze: float = 0.0,
    alike: float = 0.0,
    kinds: Sequence[str] = KINDS,
) -> Page:
    """Return document `index` of a part: `facts` sentences among `filler` ones, and a question for each.

    With the probability `cloze` a question is the sentence up to its answer. The facts are of any of the `kinds`; with
    the probability `alike` all of a document are of one kind, and only the names tell which one a question means.
    """
    draw = random.Random(f"{part} {index} {facts} {filler}")
    # A draw of its own: documents without `alike` stay what they were.
    mixed = random.Random(f"kinds of {part} {index}")
    kinds = (mixed.choice(kinds),) if mixed.random() < alike else kinds
    found = _facts(draw, part, facts, kinds)
    sentences = [each.sentence for each in found] + draw.sample(FILLER, filler)
    draw.shuffle(sentences)
    draw.shuffle(found)
    return Page(" ".join(sentences), [each.cloze() if draw.random() < cloze else each.asked(found) for each in found])


def exercise(index: int, *, facts: int, kinds: Sequence[str] = KINDS) -> Page | GappedText:
    """Return a reading exercise with names of the training part: of every fact, whose it is.

    In half of them that is asked, in the words of a question or in those of the sentence up to its answer; in the
    others it fills the place of the answer in a text. It has always been said before, some words off.
    """
    draw = random.Random(f"exercise {index}")
    found = [each.about() for each in _facts(draw, "train", facts, kinds)]
    if draw.random() < 0.5:
        return Page("", [draw.choice((each.cloze, each.asked))() for each in found])
    text, gaps = "", []
    for each in found:
        before, after = each.around()
        text += f" {before} " if text else f"{before} "
        gaps.append((len(text), len(text) + len(each.answer)))
        text += each.answer + after
    return GappedText(text, gaps)


def _facts(draw: random.Random, part: str, count: int, kinds: Sequence[str]) -> list[Fact]:
    words, used = words_of(part), set[str]()
    return [DRAWS[draw.choice(kinds)](draw, words, used) for _ in range(count)]
