r"""Does a memory of dictionary entries know which definition belongs to which headword? Real text, the document gone.

    apt-get install dict-gcide
    python benchmarks/study/whose_word.py --seed 0 1 2 --arms memory --reader_steps 4000 --reads_on --targets o_proj \
        --batch 8 --whole_until 0.7 --steps 1600
    python benchmarks/study/whose_word.py --smoke      # everything once, tiny: no result

Documents, questions and test are those of `dictionary.py` (four entries, headwords that are in no training document);
the training is that of `whose_all.py`. In an exercise in reading the network says which entry a definition, a question
or a headword belongs to, in the place where its answer would stand: "anvil: [anvil].", "[an iron block]: an iron block
on which ...". `chosen` says how often the right one of a document's four answers is the likeliest; a guess has 0.25.
"""

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from dictionary import Dictionary, Entry, first_words, question
from pages import GappedText, Page, Question, Stage
from reading_command import main


class WhoseWord(Dictionary):
    """Entries of which any may be asked about, and exercises in telling them apart."""

    name = "whose_word"
    # As in `whose_all.py`, whose comments say why.
    strides = 12
    network: ClassVar[Mapping[str, Any]] = {"partial_rotary_factor": 1.0, "rope_theta": 100.0}
    time_epsilon = 0.999
    after_reading = 0.7

    def __init__(self, *, is_tiny: bool = False) -> None:
        super().__init__(is_tiny=is_tiny)
        self.stages = (Stage(share=1.0, facts=4),)

    def exercise(self, index: int) -> Page | GappedText:
        """Return two entries, each with what it is asked by in the place of its answer."""
        draw = random.Random(f"exercise {index}")
        chosen = [(entry, draw.random() < 0.5) for entry in draw.sample(self.entries["train"], 2)]
        if draw.random() < 0.5:
            return Page("", [_asked(entry, is_for_word) for entry, is_for_word in chosen])
        text, gaps = "", []
        for (word, meaning), is_for_word in chosen:
            text += " " if text else ""
            said = first_words(meaning) if is_for_word else word
            text += "" if is_for_word else f"{word}: "
            gaps.append((len(text), len(text) + len(said)))
            text += f"{said}: {meaning}." if is_for_word else f"{said}."
        return GappedText(text, gaps)


def _asked(entry: Entry, is_for_word: bool) -> Question:
    """Return the question about an entry; its answer is what it is asked by."""
    word, meaning = entry
    asked = question(entry, is_for_word, ())
    return Question(asked.kind, asked.text, first_words(meaning) if is_for_word else word)


if __name__ == "__main__":
    main(WhoseWord, __doc__)
