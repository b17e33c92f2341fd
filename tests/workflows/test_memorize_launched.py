"""Documents shared by the processes of a launch: each is written once, and as one process writes it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.testing import assert_close

from memdlm.cli.main import main
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.memory import read_memory
from memdlm.workflows.sessions.team import Team
from tiny import V, tiny
from trees import tree

ROOT = Path(__file__).parents[2]
WORDS = [f"w{index:02}" for index in range(V - 5)]
COUNT = 12
FLAGS = ["--mem_inner_rank", "4", "--mem_inner_layer_fraction", "0.5", "--mem_inner_lr", "0.5", "--batch_size", "2"]


def command(*more):
    return ["memorize", "--model", "model", "--file", "notes", "--output", "memories", *FLAGS, *more]


def launched(folder, *more):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    # A port of the system's choice.
    start = [sys.executable, *launch, "--main_process_port", "0", "-m", "memdlm", *command(*more)]
    return subprocess.Popen(
        start,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = tiny("llada2")
    network.config.max_position_embeddings = 40
    network.save_pretrained("model")
    build_word_tokenizer(WORDS).save_pretrained("model")
    (tmp_path / "notes").mkdir()
    for number in range(COUNT):
        length = 60 if number == 0 else 9 + number
        words = (WORDS[(number + 7 * index) % len(WORDS)] for index in range(length))
        (tmp_path / "notes" / f"n{number:02}.md").write_text(" ".join(words))
    return tmp_path


def written(out):
    return [line.split(":")[0] for line in out.splitlines() if "tokens written in" in line]


@pytest.mark.slow
def test_two_processes_share_the_documents_and_go_on_after_a_kill(here):
    first = launched(here)
    while not list(here.glob("memories/*.mem")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = {path.parent.name: path.stat().st_mtime_ns for path in here.glob("memories/*.mem/memory.json")}

    second = launched(here)
    out, err = second.communicate()
    assert second.returncode == 0, err
    names = [f"memories/n{number:02}.mem" for number in range(COUNT)]
    unchanged = [line.split(":")[0] for line in out.splitlines() if "unchanged" in line]
    assert sorted([*unchanged, *written(out)]) == names, "each once, by one process"
    assert unchanged, "what was written before the kill"
    assert written(out), "and the kill came before the end"
    assert f"{len(written(out))} written" in err
    assert err.count(" are written in chunks of 40") <= 1, "one process speaks for both"
    assert sorted(path.name for path in here.glob("memories/*")) == [Path(name).name for name in names]
    for path in here.glob("memories/*.mem/memory.json"):
        assert before.get(path.parent.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    kept = tree(here / "memories")

    (here / "memories").rename("of_two")
    assert main(command()) == 0
    for name in names:
        one, two = read_memory(name), read_memory(name.replace("memories", "of_two"))
        for module, pair in one.pairs.items():
            other = two.pairs[module]
            assert_close(other["B"] @ other["A"], pair["B"] @ pair["A"], rtol=1e-3, atol=1e-5)
        assert one.provenance["ids_sha256"] == two.provenance["ids_sha256"]

    (here / "memories").rename("of_one")
    (here / "of_two").rename("memories")
    (here / "notes" / "n03.md").write_text("w01 w02 w03")
    refused = launched(here)
    out, err = refused.communicate()
    assert refused.returncode != 0
    assert err.count("'memories/n03.mem' holds a memory already") == 1
    assert tree(here / "memories") == kept


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_launch_that_cannot_be_is_an_error(variables, said, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        Team.launched()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_the_whole_work_once(size):
    work = list(range(5))
    assert sorted(piece for rank in range(size) for piece in Team(rank, size).share(work)) == work
