"""A memory of dictionary entries: real text, asked with the document gone, both ways round.

    apt-get install dict-gcide
    python benchmarks/study/dictionary.py --size 1M --seed 0 --minutes 60
    python benchmarks/study/dictionary.py --size 100M --seed 0 --minutes 60 --device cuda
    python benchmarks/study/dictionary.py --smoke   # everything once, tiny: no result

The text is GCIDE's (the GNU Collaborative International Dictionary of English, GPL), as Debian's package installs it;
none of it is part of this repository. A document is a few entries, "anvil: an iron block ..."; asked is the headword of
a definition, and the first words of a headword's definition. Headwords of the test occur in no training document,
neither as headwords nor in a definition there. What a network knows of English could still tell a headword. How often
it does is seen from the same questions without memory, and with the memory of another document. Arms, time and rows are
those of `english.py`.

**Stride.** What tells a headword are the first words of its definition, and they stand next to it; so do the words that
the headword tells. A stride of 6 keeps five tokens on either side in sight, and hides one in six beyond.
"""

import gzip
import random
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from pages import Corpus, Page, Question, Stage
from reading_command import main

from memdlm.data.tokenizer import build_byte_pair_tokenizer

FOLDER = Path("/usr/share/dictd")
TEXT, INDEX = "gcide.dict.dz", "gcide.index"
DIGITS = {
    letter: value for value, letter in enumerate(string.ascii_uppercase + string.ascii_lowercase + "0123456789+/")
}
"""Of the numbers in dictd's index, to the base of 64."""
FIRST_WORDS = 3
SHORT, LONG = 4, 10
"""Words of the definitions that are used."""
WORD = re.compile(r"[a-z]{4,12}")
MOST_BYTES = 2000
"""Of an entry are read: its first sense begins there, and some entries are pages long."""


Entry = tuple[str, str]
"""A headword and its definition."""


def is_installed(folder: Path = FOLDER) -> bool:
    return (folder / TEXT).exists() and (folder / INDEX).exists()


def installed(folder: Path = FOLDER) -> tuple[Path, Path]:
    """Return the dictionary's text and its index; ends the program where they are missing."""
    if not is_installed(folder):
        raise SystemExit(f"The dictionary is not installed in {folder}. On Debian: apt-get install dict-gcide")
    return folder / TEXT, folder / INDEX


def number(digits: str) -> int:
    found = 0
    for letter in digits:
        found = 64 * found + DIGITS[letter]
    return found


def definition(entry: str) -> str | None:
    """Return the first definition of an entry as plain lower-case words; None where it has no short one.

    An entry is a head (the word, how it is spoken, its origin in brackets) and then indented senses. The first sense
    may be numbered, and may begin with a field ("(Naut.)").
    """
    head, _, rest = entry.partition("\n")
    if "\\" not in head:
        return None
    # The head goes on until the brackets of the origin are closed.
    lines = rest.split("\n")
    depth = head.count("[") - head.count("]")
    while depth > 0 and lines:
        line = lines.pop(0)
        depth += line.count("[") - line.count("]")
    sense = re.split(r"\n\s*\n|\[|;|--", " \n".join(lines).strip("\n"), maxsplit=1)[0]
    sense = re.sub(r"\s+", " ", sense).strip()
    sense = re.sub(r"^(1\. )?(\([^)]*\) ?)?(\(\w\) ?)?", "", sense).replace("{", "").replace("}", "")
    sense = re.split(r"[.:]", sense, maxsplit=1)[0].strip(" ,").lower()
    words = sense.split()
    is_plain = re.fullmatch(r"[a-z ,'-]+", sense) is not None
    return sense if is_plain and SHORT <= len(words) <= LONG else None


def entries(folder: Path = FOLDER) -> Iterator[Entry]:
    """Yield (headword, definition) of every plain entry that has a short one, each headword once."""
    text, index = installed(folder)
    data = gzip.decompress(text.read_bytes())
    known: set[str] = set()
    for line in index.read_text(encoding="utf-8").splitlines():
        word, start, size = line.split("\t")[:3]
        word = word.lower()
        if word in known or not WORD.fullmatch(word):
            continue
        first = number(start)
        entry = data[first : first + min(number(size), MOST_BYTES)].decode("utf-8", "replace")
        found = definition(entry) if entry.lower().startswith(f"{word} \\") else None
        # A definition that names its headword gives it away.
        if found is not None and word[:5] not in found:
            known.add(word)
            yield word, found


def shared_out() -> dict[str, list[Entry]]:
    """Share the entries out, a tenth each for validation and test; no training entry mentions their headwords."""
    everything = sorted(entries())
    random.Random("dictionary").shuffle(everything)
    tenth = len(everything) // 10
    held_out = {word for word, _ in everything[: 2 * tenth]}
    train = [each for each in everything[2 * tenth :] if not held_out & set(re.findall("[a-z]+", each[1]))]
    return {"validation": everything[:tenth], "test": everything[tenth : 2 * tenth], "train": train}


def question(entry: Entry, is_for_word: bool, document: Sequence[Entry]) -> Question:
    """Ask for the headword, or for the first words of its definition; those of the document's others can be chosen."""
    word, meaning = entry
    others = [each for each in document if each != entry]
    if is_for_word:
        return Question("headword", f"Which word means {meaning}?", word, [each for each, _ in others])
    first = [first_words(each) for _, each in others]
    return Question("definition", f"What is the meaning of {word}?", first_words(meaning), first)


def first_words(meaning: str) -> str:
    return " ".join(meaning.split()[:FIRST_WORDS])


class Dictionary(Corpus):
    """Documents of several entries."""

    name = "dictionary"
    slot = 10
    strides = 6

    def __init__(self, *, is_tiny: bool = False) -> None:
        self.stages = (
            (Stage(share=1.0, facts=2),)
            if is_tiny
            else (
                Stage(share=0.4, facts=2),
                Stage(share=0.3, facts=3),
                Stage(share=0.3, facts=4),
            )
        )
        self.entries = shared_out()
        text = [f"{word}: {meaning}." for word, meaning in self.entries["train"]]
        self.tokenizer = build_byte_pair_tokenizer(text, 400 if is_tiny else 2048)

    def page(self, part: str, index: int, stage: Stage) -> Page:
        """Return a document of a part: each entry is asked about once, one way or the other."""
        draw = random.Random(f"{part} {index} {stage.facts}")
        chosen = draw.sample(self.entries[part], stage.facts)
        text = " ".join(f"{word}: {meaning}." for word, meaning in chosen)
        draw.shuffle(chosen)
        return Page(text, [question(entry, draw.random() < 0.5, chosen) for entry in chosen])


if __name__ == "__main__":
    main(Dictionary, __doc__)
