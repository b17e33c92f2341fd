"""Pages: texts with questions about them, and how they become tokens.

Every answer has a slot of equally many tokens, filled up with the end-of-turn token, so that its length is not given
away.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from transformers import PreTrainedTokenizerBase

from memdlm.data.chat import ChatEncoder, Encoded
from memdlm.data.tokenizer import EOT, USER
from memdlm.errors import ConfigError
from memdlm.evaluation.prompts import answer_spans
from memdlm.types import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a text. `kind` groups questions in the results."""

    kind: str
    text: str
    answer: str
    others: Sequence[str] = ()
    """Answers that the document has to other questions of the kind."""


@dataclass(frozen=True, slots=True)
class Page:
    """A text, and questions about it."""

    text: str
    questions: Sequence[Question]


@dataclass(frozen=True, slots=True)
class GappedText:
    """A text with places that are hidden, to be filled in: their first characters, and those behind their last ones."""

    text: str
    gaps: Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A share of the training, and what its pages are like."""

    share: float
    facts: int
    filler: int = 0
    cloze: float = 0.0
    """Share of the questions that are put in the text's own words."""
    alike: float = 0.0
    """Share of the pages whose facts are all of one kind."""


class Corpus(ABC):
    """Pages of three parts (train, validation, test) that share no name and no headword."""

    name: ClassVar[str]
    tokenizer: PreTrainedTokenizerBase
    stages: Sequence[Stage]
    """Of the training, in order. The last one is what is measured, without cloze questions."""
    slot: int
    """Tokens of an answer, its end included."""
    strides: int
    has_kinds: ClassVar[bool] = False
    """Whether its pages can be drawn with facts of one kind only; they are then measured, too."""

    network: ClassVar[Mapping[str, Any]] = {}
    """What its networks have other than the small family's defaults."""
    time_epsilon: ClassVar[float] = 1e-3
    """Lowest diffusion time of the training; near 1, answers are hidden as a whole. In exercises they always are."""
    after_reading: ClassVar[float] = 1 / 3
    """Share of the learning rate that a network is trained with after exercises. With all of it a network unlearns to
    read before it has learned to write."""

    @abstractmethod
    def page(self, part: str, index: int, stage: Stage) -> Page:
        """Return page `index` of a part; the same one at every call."""

    def exercise(self, index: int) -> Page | GappedText:
        """Return a reading exercise: what it asks for stands in itself. Raises ConfigError where there are none."""
        raise ConfigError(f"reader_steps: {self.name} has no reading exercises; leave reader_steps at 0.")


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A page as tokens."""

    shown: Encoded
    """The questions, their slots being targets; behind the text where it is in sight."""
    context: list[int]
    kinds: list[str]
    choices: list[list[list[int]]]
    """Of every question the slots that one can choose from: the right one first, then those of the others."""


@final
class Reader:
    """Turns pages into tokens."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.encoder = corpus, ChatEncoder(corpus.tokenizer)
        self.user, self.end = (corpus.tokenizer.convert_tokens_to_ids(each) for each in (USER, EOT))

    def ask(self, page: Page, *, in_sight: bool) -> Asked:
        """Leave out questions whose answer does not fit into its slot."""
        context, kinds, choices = self.encoder.text(page.text), [], []
        ids = list(context) if in_sight else []
        labels = [IGNORE_INDEX] * len(ids)
        for question in page.questions:
            answer = self.slot(question.answer)
            if answer is None:
                continue
            asked = [self.user, *self.encoder.text(question.text)]
            ids += asked + answer
            labels += [IGNORE_INDEX] * len(asked) + answer
            kinds.append(question.kind)
            others = [slot for slot in map(self.slot, question.others) if slot is not None and slot != answer]
            choices.append([answer, *others])
        return Asked(shown=Encoded(ids, labels, 0), context=context, kinds=kinds, choices=choices)

    def slot(self, answer: str) -> list[int] | None:
        """Return an answer's tokens, filled up; None where it does not fit."""
        ids = self.encoder.text(answer)
        return ids + [self.end] * (self.corpus.slot - len(ids)) if len(ids) < self.corpus.slot else None

    def exercise(self, index: int) -> Encoded:
        """Return a reading exercise, without a text beside it."""
        found = self.corpus.exercise(index)
        if isinstance(found, Page):
            return self.ask(found, in_sight=False).shown
        tokens = self.corpus.tokenizer(found.text, return_offsets_mapping=True, add_special_tokens=False)
        labels = [
            token if any(start < last and first < end for first, last in found.gaps) else IGNORE_INDEX
            for token, (start, end) in zip(tokens.input_ids, tokens.offset_mapping, strict=True)
        ]
        return Encoded(tokens.input_ids, labels, 0)

    def said(self, slot: list[int]) -> str:
        """Return the text of a slot, up to its end; without an end, all of it."""
        end = slot.index(self.end) if self.end in slot else len(slot)
        return str(self.corpus.tokenizer.decode(slot[:end]))

    def pages(self, part: str, count: int, *, in_sight: bool, alike: float = 0.0) -> list[Asked]:
        """Return the first pages of a part, as the last stage has them, asked in other words."""
        stage = dataclasses.replace(self.corpus.stages[-1], cloze=0.0, alike=alike)
        return [self.ask(self.corpus.page(part, index, stage), in_sight=in_sight) for index in range(count)]


def answer_spans_of(asked: Asked, slot: int) -> list[tuple[int, int]]:
    """Return where the slots are."""
    spans = answer_spans(asked.shown.labels)
    assert all(last - first == slot for first, last in spans)
    return spans
