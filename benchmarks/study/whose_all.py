r"""Does a memory of English know whose a fact is, of all five kinds of facts? `whose.py` has jobs alone.

    python benchmarks/study/whose_all.py --seed 0 1 2 --arms memory --reader_steps 1500 --reads_on \
        --targets o_proj --batch 8 --whole_until 0.7 --steps 2000
    python benchmarks/study/whose_all.py --seed 0 1 2 --arms memory --reader_steps 1500 --steps 1200
    python benchmarks/study/whose_all.py --smoke      # everything once, tiny: no result

A training document has four facts of one kind: four objects and where each is, say. Objects, persons and events of the
test are in no training document. The test has two sets of documents: of four facts of any kind (`measured` in the
rows), and of four facts of one kind (`alike`), in which only names and objects tell the facts apart. Exercises in
reading are those of `whose.py`, of all kinds.

The first command does four things that the second does not. Exercises go on beside the memory's training. The memory is
in the output projection of the last block's attention. A step has half as many documents, and so there are more steps.
Answers are hidden as a whole only until the network finds them; after that it sees some that are filled in half, as in
decoding.
"""

from pages import Stage
from reading_command import main
from small_english import KINDS
from whose import Whose


class WhoseAll(Whose):
    """Documents of any kind of facts; in training, of one kind each."""

    name = "whose_all"
    has_kinds = True
    kinds = KINDS
    # With a third of it, as for jobs alone, no answer was right after 240 steps.
    after_reading = 0.7

    def __init__(self, *, is_tiny: bool = False) -> None:
        super().__init__(is_tiny=is_tiny)
        self.stages = (Stage(share=1.0, facts=4, cloze=0.5, alike=1.0),)


if __name__ == "__main__":
    main(WhoseAll, __doc__)
