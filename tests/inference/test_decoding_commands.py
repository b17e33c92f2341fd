"""generate, infill and chat as users meet them: flags, a terminal, and the page of a trace."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memdlm.cli.main import main
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import Decoder, GenerationConfig
from memdlm.report.trace import Trace
from tiny import V, tiny

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module", params=["llada2", pytest.param("llada", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param)
    model.config.max_position_embeddings = 40
    model.save_pretrained(path)
    build_word_tokenizer([f"w{index:02}" for index in range(V - 5)]).save_pretrained(path)
    return path


def test_generate_prints_responses_and_what_they_took(folder, tmp_path, capsys):
    page = tmp_path / "out.html"
    flags = ["--max_new_tokens", "9", "--suppress_tokens", "0", "2", "3", "4", "--mem_enabled", "--mem_inner_lr", "0.5"]
    assert main(["generate", "w01 w02", "w03", "--model", str(folder), "--trace", str(page), *flags]) == 0
    out, err = capsys.readouterr()
    assert [len(line.split()) for line in out.splitlines()] == [9, 9]
    assert re.search(r"18 tokens in [\d.]+ s, [\d.]+ tokens/s, \d+ forward passes", err)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])
    assert data["total"] == 18
    assert sum(map(len, data["steps"])) == 18
    assert "http" not in page.read_text(), "the page needs no other"


def test_infill_fills_the_blanks_alone(folder, capsys):
    assert main(["infill", "w01 _ w02 _", "--blank", "_", "--model", str(folder), "--preset", "llada21_speed"]) == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "w01"
    assert words[2] == "w02"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "w01"], "--model is missing"),
        (["generate", "w01", "--model", "x", "--top_kk", "3"], "Did you mean '--top_k'"),
        (["generate", "w01", "--model", "x", "--preset", "fast"], "preset: 'fast' is not known"),
        (["generate", "w01", "--model", "x", "--steps", "3", "--steps_per_block", "2"], "say the same"),
        (["chat", "--model", "x", "--max_context", "1"], "max_context must be at least 2"),
    ],
)
def test_bad_flags_end_in_one_line(argv, message, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_token_cannot_end_the_script_of_the_page():
    tokenizer = build_word_tokenizer(["</script><b>", *(f"w{index:02}" for index in range(V - 6))])
    job = Decoder(tiny("llada"), tokenizer, GenerationConfig(max_new_tokens=3)).prepare(["</script><b> w01"])
    trace = Trace(job)
    for step in job.steps():
        trace.add(step)
    assert trace.page().count("</script>") == 2


class Terminal:
    """A child process that believes it talks to a person."""

    def __init__(self, arguments):
        self.master, slave = pty.openpty()
        environment = os.environ | {
            "PYTHONPATH": str(SOURCE),
            "TERM": "xterm",
            "COLUMNS": "100",
            "OMP_NUM_THREADS": "1",
        }
        self.child = subprocess.Popen(
            [sys.executable, "-m", "memdlm", *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self.seen = ""

    def until(self, pattern, seconds=240):
        """Read on until `pattern` has come, and return what came since the last call."""
        start, deadline = len(self.seen), time.monotonic() + seconds
        while not re.search(pattern, self.seen[start:]):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[start:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode()
                except OSError:  # the child has closed its end
                    break
        return self.seen[start:]

    def say(self, line):
        os.write(self.master, (line + "\n").encode())


def test_a_conversation_in_a_terminal(folder, tmp_path):
    saved = tmp_path / "chat.json"
    flags = ["--max_new_tokens", "8", "--suppress_tokens", "0", "2", "3", "4", "--system", "w09", "--mem_enabled"]
    terminal = Terminal(["chat", "--model", str(folder), *flags])
    try:
        terminal.until("> ")
        terminal.say("w01 w02")
        shown = terminal.until(r"(w\d\d ){7}w\d\d\r\n> ")
        assert "\u2591" in shown, "tokens that are still masked are seen while it runs"
        terminal.say("/memory off")
        terminal.until(r"\(memory is off\)\s+> ")
        for _ in range(3):
            terminal.say("w04 w05 w06")
            terminal.until(r"(w\d\d ){7}w\d\d\r\n> ")
        assert "no longer fit and were dropped" in terminal.seen
        terminal.say("/steps 3")
        terminal.until(r"\(3 denoising steps per answer\)\s+> ")
        terminal.say(f"/save {saved}")
        terminal.until(r"\(saved to [^)]*\)\s+> ")
        terminal.say("/nw")
        terminal.until(r"Did you mean '/new'")
        terminal.say("/new")
        terminal.until(r"\(new conversation\)\s+> ")
        terminal.say("/exit")
        terminal.until(r"4 answers: 32 tokens in [\d.]+ s, [\d.]+ tokens/s, \d+ forward passes")
        assert terminal.child.wait(120) == 0
    finally:
        terminal.child.kill()
        os.close(terminal.master)
    messages = json.loads(saved.read_text())["messages"]
    assert messages[0] == {"role": "system", "content": "w09"}
    assert [message["role"] for message in messages[1:]] == ["user", "assistant"] * ((len(messages) - 1) // 2)


def test_a_conversation_through_a_pipe_is_plain_text(folder):
    done = subprocess.run(
        [sys.executable, "-m", "memdlm", "chat", "--model", str(folder), "--max_new_tokens", "4"],
        input="w01\n\n" + "w02 " * 60 + "\n/exit\n",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        check=True,
    )
    assert "\x1b" not in done.stdout
    assert "there is room for 40" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 answers: ")
