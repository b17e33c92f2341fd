r"""Does a memory of English know whose a fact is, among sentences that say nothing? `whose_all.py` has facts alone.

    python benchmarks/study/among.py --seed 0 1 2 --arms memory --reader_steps 1500 --reads_on \
        --targets o_proj --batch 8 --whole_until 0.7 --steps 2000
    python benchmarks/study/among.py --smoke      # everything once, tiny: no result

The documents of the test are those of `english.py`: four facts of any kind (`measured` in the rows), and of one kind
(`alike`), among two sentences of filler. Training is that of `whose_all.py`, and in the last three tenths its documents
have filler, too.
"""

from pages import Stage
from reading_command import main
from whose_all import WhoseAll


class Among(WhoseAll):
    """Documents of facts of one kind each, at last among filler."""

    name = "among"

    def __init__(self, *, is_tiny: bool = False) -> None:
        super().__init__(is_tiny=is_tiny)
        self.stages = (
            Stage(share=0.7, facts=4, cloze=0.5, alike=1.0),
            Stage(share=0.3, facts=4, filler=2, cloze=0.5, alike=1.0),
        )


if __name__ == "__main__":
    main(Among, __doc__)
