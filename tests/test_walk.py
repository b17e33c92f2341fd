"""The walk of a prompt that docs/architecture.md describes is the one that the code takes."""

import re
import traceback
from pathlib import Path

from memdlm.cli.main import main
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.memory.inner_loop import LocalSGD
from tiny import V, tiny

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "memdlm"
MOST_STATIONS, MOST_LINES = 12, 40


def described():
    """The section's lines."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return text.partition("## A prompt's walk\n")[2].partition("\n## ")[0].strip().splitlines()


def test_a_prompt_walks_where_the_page_says(tmp_path, monkeypatch, capsys):
    tiny("llada").save_pretrained(tmp_path)
    build_word_tokenizer([f"w{index:02}" for index in range(V - 5)]).save_pretrained(tmp_path)
    stacks, step = [], LocalSGD.step

    def noted(self, *arguments):
        stacks.append([frame for frame in traceback.extract_stack() if PACKAGE in Path(frame.filename).parents])
        return step(self, *arguments)

    monkeypatch.setattr(LocalSGD, "step", noted)
    words = ["--max_new_tokens", "4", "--device", "cpu", "w01 w02 w03 w04"]
    assert main(["generate", "--model", str(tmp_path), "--mem_enabled", "True", *words]) == 0
    capsys.readouterr()
    assert stacks
    assert len(stacks[0]) <= MOST_STATIONS
    files = [Path(frame.filename).relative_to(PACKAGE).as_posix() for frame in stacks[0]]
    stations = [re.match(r"\d+\. `([\w/]+\.py)`", line) for line in described()]
    stations = [found[1] for found in stations if found]
    # A file may appear several times in a row; the border that catches faults stands within the first station.
    walked = [name for name in dict.fromkeys(files) if name != "cli/border.py"]
    assert walked == stations[: len(walked)]
    assert len(walked) == 7


def test_the_walk_is_short_and_its_files_are_there():
    lines = described()
    assert len(lines) <= MOST_LINES
    named = re.findall(r"`([\w/]+\.py)`", "\n".join(lines))
    assert len(named) > 12
    for name in named:
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name
