"""What a command writes into a pipe is about the run: no bars, no dictionaries, no warnings of libraries."""

import json
import os
import re
import subprocess
import sys

import pytest
from transformers import TrainerState

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.models import build_model
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display
from memdlm.workflows.training_table import COLUMNS, TrainingTable
from tiny import CONFIGS


def run(words, folder):
    """What a fresh process writes: standard output, and standard error without the lines of job and data."""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MEMDLM_CACHE": str(folder / "index")}
    done = subprocess.run(
        [sys.executable, "-m", "memdlm", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    tokenizer = build_word_tokenizer(f"w{index}" for index in range(20))
    config = CONFIGS["lladamoe"]()
    config.vocab_size = len(tokenizer)
    build_model(config, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"w{n % 9} w1", "response": f"w2 w{n % 7}"} for n in range(12)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_training_with_a_recipe_writes_named_figures_and_nothing_else(folder):
    words = ["train", "llada_moe_1gpu_memdlm", "--model", "model", "--dataset_args", "chat.jsonl[train:8,test:4]"]
    words += ["--max_steps", "2", "--logging_steps", "1", "--max_length", "64", "--bf16", "False"]
    out, err = run([*words, "--report_to", "none", "--output_dir", "runs/a"], folder)
    assert out == "runs/a\n"
    expected = [
        r"device cpu, weights in 4 bits \(nf4\), .*",
        r"tokenizing train +[\d.]+ s",
        r"tokenizing test +[\d.]+ s",
        r"train: 8 of 8 conversations are used",
        r"test: 4 of 4 conversations are used",
        r" +step +epoch +" + " +".join(re.escape(heading) for heading, _ in COLUMNS.values()),
        r"train +1 +0\.25( +[\d.e+-]+){3,}",
        r"eval +1 +0\.25( +[\d.e+-]+){4}",
        r"train +2 +0\.50( +[\d.e+-]+){3,}",
        r"eval +2 +0\.50( +[\d.e+-]+){4}",
        r"2 steps in [\d.]+ s, mean loss [\d.]+; all figures are in runs/a/trainer_state\.json",
        r"training +[\d.]+ s",
    ]
    lines = err.splitlines()
    assert len(lines) == len(expected), err
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    # The table is what the log says.
    log = json.loads((folder / "runs/a/trainer_state.json").read_text())["log_history"]
    first = next(row for row in log if "eval_nll" in row)
    assert f"{first['eval_nll']:.4g}" in lines[7].split()


@pytest.mark.slow
def test_generating_writes_two_lines_about_itself(folder):
    out, err = run(["generate", "--model", "model", "--max_new_tokens", "2", "w1"], folder)
    assert len(out.splitlines()) == 1
    assert re.fullmatch(r"device cpu, .*\n2 tokens in .*\n", err), err


@pytest.mark.slow
def test_preprocessing_and_a_dry_run_write_no_bars(folder):
    data = ["--model", "model", "--dataset_args", "chat.jsonl"]
    _, err = run(["preprocess", *data, "--output_dir", "data/chat"], folder)
    assert re.fullmatch(r"tokenizing +[\d.]+ s\n", err), err
    _, err = run(["train", "llada_moe_1gpu_mdlm", *data, "--dry_run"], folder)
    assert [line.split()[0] for line in err.splitlines()] == ["tokenizing", "nothing"], err


def table(width, **options):
    console = PlainConsole(file=open(os.devnull, "w"), width=width, force_terminal=True)  # noqa: SIM115
    told = []
    display = Display(console)
    display.say = told.append
    return TrainingTable(display, has_memory=True, has_bar=False, **options), told


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_lines(width):
    shown, told = table(width)
    state = TrainerState(global_step=7, epoch=0.5, is_world_process_zero=True)
    shown.on_log(None, state, None, logs=dict.fromkeys(COLUMNS, 1.0))
    assert len(told) == 2
    assert all(len(line) <= width for line in told)
    assert len(told[0]) == len(told[1])
    assert ("tokens/s" in told[0]) == (width == 120)


def test_a_figure_without_a_column_is_named_in_its_row():
    shown, told = table(200)
    state = TrainerState(global_step=7, epoch=0.5, is_world_process_zero=True)
    shown.on_log(None, state, None, logs={"loss": 2.0, "skipped_updates": 3.0, "inner_loss_1": 9.0})
    assert told[1].endswith("skipped_updates 3")
    assert "9" not in told[1]


def test_other_ranks_say_nothing():
    shown, told = table(200)
    shown.on_log(None, TrainerState(is_world_process_zero=False), None, logs={"loss": 2.0})
    assert told == []
