"""Every command that writes: somebody's files stay, the first result stays until the second is whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memdlm.cli.main import main
from memdlm.outputs import GENERATOR, MARKER
from trees import fill, tree

MODEL = str(Path(__file__).parents[1] / "golden" / "llada" / "checkpoint")
TRAIN = [
    "--max_steps",
    "1",
    "--report_to",
    "none",
    "--disable_tqdm",
    "True",
    "--eval_strategy",
    "no",
    "--use_cpu",
    "True",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A document, conversations, questions, a memory of the document, and a training run."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "doc.txt").write_text("w1 w2 w3 w4 w5 w6")
    turns = [{"role": "user", "content": "t1 t2"}, {"role": "assistant", "content": "t3 t4"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (folder / "questions.jsonl").write_text('{"question": "w1"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMDLM_CACHE", str(folder / "cache"))
        assert run("memorize", folder, folder / "doc.mem") == 0
        assert run("train", folder, folder / "run") == 0
    return folder


@pytest.fixture(autouse=True)
def _own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "cache"))


def words_of(command, inputs, output):
    """The command line of `command`, writing to `output`, without leave to replace."""
    model = ["--model", MODEL]
    data = [*model, "--dataset_args", str(inputs / "chat.jsonl")]
    questions = ["--memory", str(inputs / "doc.mem"), "--questions", str(inputs / "questions.jsonl")]
    return {
        "preprocess": [*data, "--output_dir"],
        "train": [*data, *TRAIN, "--output_dir"],
        "merge": ["--adapter", str(inputs / "doc.mem"), "--output"],
        "memorize": [*model, "--file", str(inputs / "doc.txt"), "--mem_num_inner_epochs", "1", "--output"],
        "ask": [*model, *questions, "--max_new_tokens", "2", "--steps", "2", "--output"],
        "exposure-bias": [*data, "--steps", "2", "--output"],
        "report": [str(inputs / "run"), "--output"],
        "generate": [*model, "w1", "--max_new_tokens", "2", "--steps", "2", "--trace"],
        "demo": ["--quick", "--out"],
    }[command] + [str(output)]


OVERWRITE = {
    **{"train": ["--overwrite_output_dir", "True"], "report": [], "generate": []},
    # An unchanged memory is not written again; another seed is a change.
    "memorize": ["--overwrite", "--seed", "1"],
}
FOLDERS = ("preprocess", "train", "merge", "memorize", "exposure-bias", "demo")
FILES = ("ask", "report", "generate")


def run(command, inputs, output, *, overwrite=False):
    more = OVERWRITE.get(command, ["--overwrite"]) if overwrite else []
    return main([command, *words_of(command, inputs, output), *more])


def lines(capsys):
    """What was said on standard error, but for progress."""
    return [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("tokenizing")]


@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_twenty_folders_of_somebodys_files_lose_none(command, inputs, tmp_path, capsys):
    for seed in range(20):
        fill(tmp_path / f"mine{seed}", seed)
    before = tree(tmp_path)
    for seed in range(20):
        for overwrite in (False, True):
            assert run(command, inputs, tmp_path / f"mine{seed}", overwrite=overwrite) == 2
            assert len(lines(capsys)) == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", FILES)
def test_somebodys_file_is_not_replaced(command, inputs, tmp_path, capsys):
    for number, text in enumerate(("", "thesis", "<html><body></body></html>", '{"question": "w1"}\n', "{}", "[1]")):
        path = tmp_path / f"thesis{number}.html"
        path.write_text(text)
        for overwrite in (False, True):
            assert run(command, inputs, path, overwrite=overwrite) == 2
            assert "it replaces only what it made itself" in capsys.readouterr().err
        assert path.read_text() == text


@pytest.mark.parametrize("command", FOLDERS)
def test_a_file_a_pipe_home_and_here_are_no_folders_to_write(command, inputs, tmp_path, capsys, monkeypatch):
    home = tmp_path / "home"
    (home / "here").mkdir(parents=True)
    (home / "file").write_text("mine")
    os.mkfifo(home / "pipe")
    (home / "link").symlink_to(home / "here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "here")
    before = tree(tmp_path)
    for name in ("../file", "../pipe", ".", "..", "~", "", "../link/", str(home), str(tmp_path), "../here/../../home"):
        assert run(command, inputs, name, overwrite=True) == 2, name
        assert len(lines(capsys)) == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["preprocess", "merge", "memorize", "exposure-bias", "ask"])
def test_ours_is_replaced_when_the_flag_is_given_and_named_in_the_refusal(command, inputs, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert run(command, inputs, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    if command in ("preprocess", "memorize"):  # what serves is left as it is
        assert run(command, inputs, tmp_path / "out") == 0
    else:
        capsys.readouterr()
        assert run(command, inputs, tmp_path / "out") == 2
        assert "add --overwrite" in capsys.readouterr().err
    assert run(command, inputs, tmp_path / "link", overwrite=True) == 0
    assert (tmp_path / "out").is_file() == (command == "ask")
    if command != "ask":
        (tmp_path / "out" / "notes.txt").write_text("mine")
        assert run(command, inputs, tmp_path / "out", overwrite=True) == 2
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["link", "out"]


@pytest.mark.parametrize("command", ["report", "generate"])
def test_a_page_of_ours_is_drawn_again(command, inputs, tmp_path):
    for _ in range(2):
        assert run(command, inputs, tmp_path / "page.html") == 0
    assert GENERATOR in (tmp_path / "page.html").read_text()


def test_a_memory_of_an_earlier_version_is_replaced_and_one_that_was_changed_is_not(inputs, tmp_path, capsys):
    assert run("memorize", inputs, tmp_path / "doc.mem") == 0
    (tmp_path / "doc.mem" / MARKER).unlink()
    assert run("memorize", inputs, tmp_path / "doc.mem", overwrite=True) == 0
    (tmp_path / "doc.mem" / MARKER).unlink()
    header = tmp_path / "doc.mem" / "memory.json"
    header.write_text(header.read_text().replace('"tokens": 6', '"tokens": 7'))
    before = tree(tmp_path / "doc.mem")
    assert run("memorize", inputs, tmp_path / "doc.mem", overwrite=True) == 2
    assert tree(tmp_path / "doc.mem") == before


# Training -------------------------------------------------------------------------------------------------------------


def test_the_folder_of_the_model_is_no_output_folder(inputs, tmp_path, capsys):
    for source in (MODEL, inputs / "run"):  # somebody's model, and one of ours
        model = tmp_path / Path(source).name
        subprocess.run(["cp", "-r", str(source), str(model)], check=True)
        before = tree(model)
        for more in ([], ["--resume", "latest"], ["--overwrite_output_dir", "True"]):
            words = ["train", "--model", str(model), "--dataset_args", str(inputs / "chat.jsonl"), *TRAIN, *more]
            assert main([*words, "--output_dir", str(model)]) == 2
            assert "output_dir" in capsys.readouterr().err
        assert tree(model) == before


def test_a_training_folder_goes_on_beside_notes_and_starts_anew_without_them(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "events.out.tfevents.1").write_text("log")
    assert run("train", inputs, out) == 0
    assert run("train", inputs, out, overwrite=True) == 0
    (out / "notes.txt").write_text("mine")
    words = ["train", *words_of("train", inputs, out)]
    assert run("train", inputs, out, overwrite=True) == 2
    assert "holds 'notes.txt'" in capsys.readouterr().err
    longer = words.copy()
    longer[longer.index("--max_steps") + 1] = "2"
    assert main([*longer, "--resume", "latest", "--resume_changed", "True"]) == 0
    (out / "checkpoint-1" / "thesis.tex").write_text("mine")
    assert main([*words, "--resume", "latest"]) == 2
    assert "checkpoint-1/thesis.tex" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == (out / "checkpoint-1" / "thesis.tex").read_text() == "mine"
    assert (out / "runs" / "events.out.tfevents.1").read_text() == "log"


def test_a_second_training_into_one_folder_is_refused(inputs, tmp_path, capsys):
    from memdlm.training.output_dir import held

    assert run("train", inputs, tmp_path / "run") == 0
    before = tree(tmp_path / "run")
    with held(tmp_path / "run", (), goes_on=True):
        assert run("train", inputs, tmp_path / "run", overwrite=True) == 2
        assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    assert tree(tmp_path / "run") == before


# A machine that takes no more -----------------------------------------------------------------------------------------

SIZES = (
    *(("preprocess", 100), ("preprocess", 1500), ("merge", 200), ("merge", 4000), ("memorize", 10), ("memorize", 600)),
    *(("ask", 20), ("report", 3000), ("exposure-bias", 500), ("train", 1000)),
)
CLOSED = ("preprocess", "merge", "memorize", "ask", "report", "train", "exposure-bias")


def limited(calls):
    """Run commands, each with files that end at a size, without root's privileges; see the worker."""
    worker = Path(__file__).parents[1] / "limited_worker.py"
    done = subprocess.run([sys.executable, str(worker), json.dumps(calls)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def last(text):
    return [line for line in text.splitlines() if line.strip()][-1]


def state(path):
    return tree(path) if path.is_dir() else path.read_bytes()


def test_a_full_disk_ends_in_one_line_and_the_earlier_result_stays(inputs, tmp_path):
    calls = []
    for command, size in SIZES:
        out, more = tmp_path / f"{command}{size}", OVERWRITE.get(command, ["--overwrite"])
        more = ["--save_strategy", "no"] if command == "train" else more
        words = [command, *words_of(command, inputs, out)]
        assert main([*words, *(more if command == "train" else [])]) == 0
        calls.append(([*words, *more], size))
    before = {path.name: state(path) for path in tmp_path.iterdir() if path.name != "cache"}
    for (words, size), (status, err) in zip(calls, limited(calls), strict=True):
        assert status == 1, (words[0], size, status, err)
        assert re.search("could not be written: (File too large|No space left)", last(err)), (words[0], size, err)
    after = {path.name: state(path) for path in tmp_path.iterdir() if path.name != "cache"}
    # Finished pieces of a preprocessing wait for the next try.
    assert {name: found for name, found in after.items() if not name.endswith(".partial")} == before


@pytest.mark.parametrize("share", [0.5, pytest.param(1.5, marks=pytest.mark.slow)], ids=["weights", "optimizer"])
def test_a_checkpoint_that_the_disk_does_not_take_leaves_the_last_one(share, inputs, tmp_path):
    out = tmp_path / "run"
    assert run("train", inputs, out) == 0
    before = tree(out / "checkpoint-1")
    size = int((out / "model.safetensors").stat().st_size * share)
    words = ["train", *words_of("train", inputs, out), "--resume", "latest", "--resume_changed", "True"]
    words[words.index("--max_steps") + 1] = "2"
    ((status, err),) = limited([(words, size)])
    assert status == 1, (status, err)
    assert "could not be written" in last(err)
    assert tree(out / "checkpoint-1") == before
    assert not (out / "checkpoint-2").exists()
    assert main(words) == 0, "with room again, it goes on"


def test_a_folder_that_is_closed_to_us_ends_in_one_line(inputs, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    calls = [([command, *words_of(command, inputs, closed / command)], None) for command in CLOSED]
    for (words, _), (status, err) in zip(calls, limited(calls), strict=True):
        assert status == 1, (words[0], status, err)
        assert "could not be written: Permission denied" in last(err)
    assert not any(closed.iterdir())
