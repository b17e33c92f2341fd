"""The border: known faults are a line and a status, unknown ones a saved traceback; streams may be gone."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from memdlm.cli import main as front
from memdlm.cli.faults import known_fault
from memdlm.cli.main import main
from memdlm.errors import CheckpointError, ConfigError, MachineError

MODEL = str(Path(__file__).parents[1] / "golden" / "llada" / "checkpoint")
SOURCE = str(Path(__file__).parents[2] / "src")


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(errno.ENOSPC, "x", "out"), 1, "'out': no space is left"),
        (OSError(errno.EACCES, "x", "out"), 1, "'out': permission denied"),
        (OSError(errno.EROFS, "x", "out"), 1, "read-only"),
        (OSError(errno.ENOENT, "x", "gone"), 2, "'gone': no such file"),
        (OSError(errno.EISDIR, "x", "folder"), 2, "this is a folder"),
        (OSError(errno.ENAMETOOLONG, "x", "n"), 2, "the name is too long"),
        (ConnectionError("refused"), 1, "the network did not answer: refused"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 2, "text is not valid in its encoding"),
        (json.JSONDecodeError("no", "{", 0), 2, "a JSON file is damaged"),
        (SafetensorError("no header"), 2, "a safetensors file is damaged: no header"),
        (MemoryError(), 1, "there is not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), 1, "there is not enough memory"),
        (AssertionError("Torch not compiled with CUDA enabled"), 1, "the device does not exist here"),
        (RecursionError("maximum"), 2, "nested too deeply"),
        (OverflowError("Python int too large"), 2, "a number is too large"),
        (ModuleNotFoundError("no pypdf", name="pypdf"), 1, "pypdf cannot be imported"),
        (ConfigError("wrong"), 2, "wrong"),
        (MachineError("gone"), 1, "gone"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_faults_have_a_status_and_words(error, status, said):
    fault = known_fault(raised(error))
    assert fault.status == status
    assert said in fault.message


def test_the_cause_decides_whose_fault_it_is():
    assert known_fault(raised(CheckpointError("unreadable"), MemoryError())).status == 1
    assert known_fault(raised(CheckpointError("unreadable"), ValueError())).status == 2


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), RuntimeError("shape"), AssertionError("x")])
def test_what_nobody_foresaw_has_no_words(error):
    assert known_fault(raised(error)) is None


@pytest.fixture
def defect(monkeypatch, tmp_path):
    """A command with a defect, in a folder of its own."""

    def broken(argv):
        raise ZeroDivisionError("by \x1b nothing")

    monkeypatch.setattr(front, "_run", broken)
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("SECRET_TOKEN", "hf_verysecret")
    return tmp_path


def test_a_defect_is_one_line_and_a_saved_traceback(defect, capsys):
    assert main(["generate", "--model", "a b"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("memdlm generate: error: memdlm did not expect this")
    assert "ZeroDivisionError: by \\x1b nothing" in lines[0]
    (saved,) = (defect / "temporary").iterdir()
    assert str(saved) in lines[0]
    text = saved.read_text()
    assert "Traceback" in text
    assert "command: memdlm generate --model 'a b'" in text
    assert "hf_verysecret" not in text
    assert not list((defect / "here").iterdir())


@pytest.mark.parametrize("way", ["first", "last", "environment"])
def test_debug_shows_the_traceback(defect, capsys, monkeypatch, way):
    argv = {"first": ["--debug", "info", "x"], "last": ["info", "x", "--debug"], "environment": ["info", "x"]}[way]
    if way == "environment":
        monkeypatch.setenv("MEMDLM_DEBUG", "1")
    assert main(argv) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not list((defect / "temporary").iterdir())


def test_debug_takes_nothing_from_the_trainer_and_from_prompts(monkeypatch):
    seen = []
    monkeypatch.setattr(front, "_run", lambda argv: seen.append(argv) or 0)
    main(["train", "--debug", "underflow_overflow"])
    main(["generate", "--debug", "--", "--debug"])
    assert seen == [["train", "--debug", "underflow_overflow"], ["generate", "--", "--debug"]]


def shell(command):
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE, "PYTHONUNBUFFERED": "", "M": f"{sys.executable} -m memdlm"},
        timeout=120,
    )


@pytest.mark.parametrize("command", ["", "report --help"])
def test_nobody_reads_the_output(command):
    done = shell(f"set -o pipefail; $M {command} | true")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed):
    done = shell(f"$M {closed}")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("command", ["", "report --help"])
def test_a_full_disk_is_said(command):
    done = shell(f"$M {command} > /dev/full")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "error: no space is left on the device; free some, or name another folder." in done.stderr


def test_an_encoding_that_lacks_a_character_shows_its_number():
    done = shell("PYTHONIOENCODING=ascii $M \u00e9")
    assert done.returncode == 2
    assert "'\\xe9' is not known" in done.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "--model", MODEL, "--seed", "1", "--seed", "2", "w1"], "--seed is given twice, 1 and 2"),
        (["memorize", "--model", MODEL, "--file", "a", "--output", "o", "--output", "p"], "--output is given twice"),
        (["merge", "--adapter", "a", "--output", "o", "--output=p"], "--output is given twice, 'o' and 'p'"),
        (["chat", "--model", MODEL, "--mem_enabled", "True", "--mem_enabled", "False"], "--mem_enabled is given twice"),
        (["info", "m", "--mem_inner_rank", "2", "--mem_inner_ran", "3"], "--mem_inner_rank is given twice, 2 and 3"),
        (["generate", "--model", MODEL, "--suppress_tokens", "1", "--suppress-tokens", "2", "--", "w1"], "given twice"),
        (
            ["generate", "--model", MODEL, "--mem_inner_lr", "0.1", "w1"],
            "mem_inner_lr=0.1 has no effect without memory",
        ),
        (["chat", "--model", MODEL, "--mem_strides", "3"], "mem_strides=3 has no effect without memory"),
        (["generate", "--model", MODEL, "--mem_enabled", "--mem_outer_mix", "0.5", "w1"], "only training reads it"),
        (
            ["memorize", "--model", MODEL, "--file", "a", "--output", "b", "--mem_batch_reach", "3"],
            "only training reads",
        ),
        (["generate", "--model", MODEL, "--cache_refresh", "8", "w1"], "cache_refresh=8 has no effect without cache="),
        (
            ["generate", "--model", MODEL, "--max_length", "9", "--max_new_tokens", "2", "w1"],
            "max_length=9 has no effect",
        ),
        (
            ["infill", "--model", MODEL, "--max_new_tokens", "2", "x"],
            "max_new_tokens=2 has no effect: an infilling is as",
        ),
        (
            ["generate", "--model", MODEL, "--suppress_tokens", "512", "--", "w1"],
            "token 512 is not in the vocabulary",
        ),
        (["generate", "--model", MODEL, "--cfg_keep_tokens", "-3", "--", "w1"], "-3 is no token id"),
        (
            ["generate", "--model", MODEL, "--trace", "no/where/x.html", "w1"],
            "'no/where/x.html' is no file in a folder",
        ),
        (["generate", "--model", MODEL, "--device", "gpu", "w1"], "device: 'gpu' is no device"),
        (["generate", "--model", MODEL, "--device", "meta", "w1"], "'meta' holds no numbers"),
        (["generate", "--model", MODEL, "caf\udce9"], "argument 4, 'caf\\udce9', is not valid UTF-8"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(argv, said, capsys, monkeypatch):
    monkeypatch.setattr("memdlm.models.hub.loading._read", None)
    assert main(argv) == 2
    line = last_line(capsys)
    assert line.startswith(f"memdlm {argv[0]}: error: ")
    assert said in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
def test_a_device_that_is_not_there_is_the_machines_fault(capsys):
    assert main(["generate", "--model", MODEL, "--device", "cuda:0", "w1"]) == 1
    assert "device: 'cuda:0' is not there" in last_line(capsys)


def test_the_same_value_twice_is_no_mistake(capsys):
    assert main(["generate", "--model", MODEL, "--max_new_tokens", "2", "--max_new_tokens=2", "w1"]) == 0


def test_a_length_in_all_stands_in_for_that_of_the_response(capsys):
    assert main(["generate", "--model", MODEL, "--max_length", "5", "w1 w2"]) == 0
    assert "3 tokens in" in capsys.readouterr().err
