"""A memory of English documents: who, what, where, in other words than the text's, with the document gone.

    python benchmarks/study/english.py --size 1M --seed 0 --minutes 60
    python benchmarks/study/english.py --size 1M --seed 10 --minutes 10 --validation --out /tmp/validation.json
    python benchmarks/study/english.py --size 100M --seed 0 --minutes 60 --device cuda
    python benchmarks/study/english.py --smoke      # everything once, tiny: no result

Documents are of `small_english.py`: five kinds of facts among filler sentences, names and objects of the test in no
training document. `--minutes` is the time of a seed, on a CPU counted in CPU time: 70 % go to the network with memory,
30 % to the control, which has the text in sight and whose steps cost a fraction. The steps are planned from a few that
are timed; when the time is over before, the training stops there. Rows say how many steps were reached, and with
`--steps` as many can be asked for. Rows that the file already has are not run again.

**Stride.** A view of the strided strategy hides every n-th token. A value is several tokens here, and the words that
tell whose it is stand up to 20 tokens before its last one. No affordable stride exceeds that distance: a write's views
have n times the document's tokens. With a stride of 6 a view hides one token in six: at most one of a name of up to six
tokens, and none of the five on either side. So a name keeps most of itself, which is enough to tell it from the others
of its document. A stride of 12 costs twice as much, and was not compared.
"""

from collections.abc import Sequence
from typing import ClassVar

from pages import Corpus, Page, Stage
from reading_command import main
from small_english import KINDS, page

from memdlm.data.tokenizer import build_byte_pair_tokenizer


class English(Corpus):
    """Documents in a small natural English."""

    name = "english"
    has_kinds = True
    kinds: ClassVar[Sequence[str]] = KINDS
    slot = 10
    strides = 6

    def __init__(self, *, is_tiny: bool = False) -> None:
        # Short documents first, half of their questions in the text's own words: how to write and to read is learned
        # there, and then what else the same thing can be called.
        self.stages = (
            (Stage(share=0.5, facts=2, cloze=0.5), Stage(share=0.5, facts=2, filler=1))
            if is_tiny
            else (
                Stage(share=0.4, facts=2, cloze=0.5),
                Stage(share=0.3, facts=3, filler=1, cloze=0.25),
                Stage(share=0.3, facts=4, filler=2),
            )
        )
        count, size = (200, 400) if is_tiny else (8000, 1536)
        self.tokenizer = build_byte_pair_tokenizer(self.texts(count), size)

    def texts(self, count: int) -> list[str]:
        """Return training text for the tokenizer, questions and answers included."""
        pages = [page("train", -1 - index, facts=6, filler=1) for index in range(count)]
        return [text for each in pages for text in (each.text, *(question.text for question in each.questions))]

    def page(self, part: str, index: int, stage: Stage) -> Page:
        """Return a document of a part."""
        return page(
            part,
            index,
            facts=stage.facts,
            filler=stage.filler,
            cloze=stage.cloze,
            alike=stage.alike,
            kinds=self.kinds,
        )


if __name__ == "__main__":
    main(English, __doc__)
