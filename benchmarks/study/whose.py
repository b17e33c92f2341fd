"""Does a memory of English know whose a fact is? Documents of four facts of one kind, of which only the names differ.

    python benchmarks/study/whose.py --seed 0 1 2 --arms memory --reader_steps 1500 --steps 240
    python benchmarks/study/whose.py --seed 0 1 2 --arms memory --steps 240
    python benchmarks/study/whose.py --seed 0 1 2 --arms "text in sight" --reader_steps 1500 --steps 800
    python benchmarks/study/whose.py --smoke      # everything once, tiny: no result

Four people have a job each, and the text is gone when it is asked what one of them does for a living. Who knows the
jobs of the text, but not whose each is, is right one time in four. Documents, words and names are those of
`english.py`; the names of the test are in no training document.

With `--reader_steps` the network first does exercises in reading, without memory: it says of whom a sentence or a
question speaks, in the place where the job would stand. The name has been said a few words before, so that nothing is
to be known. What it learns is to have the name in mind there, new names, too. This is what a write needs, and a
question.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from english import English
from pages import GappedText, Page, Stage
from reading_command import main
from small_english import exercise


class Whose(English):
    """Documents whose facts are told apart by names alone."""

    name = "whose"
    has_kinds = False
    kinds = ("job",)
    # A view of a stride of 6 often hides a part of the name together with the job.
    strides = 12
    # Short waves tell positions a few tokens apart from each other.
    network: ClassVar[Mapping[str, Any]] = {"partial_rotary_factor": 1.0, "rope_theta": 100.0}
    # With a part of an answer in sight, a network learns to complete it, and hardly to look for it.
    time_epsilon = 0.999

    def __init__(self, *, is_tiny: bool = False) -> None:
        super().__init__(is_tiny=is_tiny)
        self.stages = (Stage(share=1.0, facts=4, cloze=0.5),)

    def exercise(self, index: int) -> Page | GappedText:
        """Return two facts, of each of which the network says whose it is."""
        return exercise(index, facts=2, kinds=self.kinds)


if __name__ == "__main__":
    main(Whose, __doc__)
