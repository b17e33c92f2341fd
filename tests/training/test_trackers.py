"""Figures reach wandb and trackio without a network; a tracker that is missing is said by the name of its extra."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from chat_folder import make_chat, make_model
from memdlm.errors import ConfigError
from memdlm.training import TrainingArguments, arguments

FIGURES = ("nll", "nll_memory", "inner_loss_1", "inner_grad_norm_2", "fast_norm", "grad_norm", "tokens_per_second")


def train(folder, tracker, **environment):
    make_model(folder / "model")
    make_chat(folder / "chat.jsonl", 8)
    options = {
        "model": folder / "model",
        "dataset_args": folder / "chat.jsonl",
        "output_dir": folder / "a run",
        "mem_enabled": True,
        "mem_inner_layer_fraction": 0.5,
        "mem_inner_rank": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": tracker,
        "use_cpu": True,
    }
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "memdlm", "train", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wandb_records_offline(tmp_path):
    pytest.importorskip("wandb")
    train(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = record.read_bytes()
    for name in (*FIGURES, "mem_inner_rank", "memdlm", "a run"):
        assert name.encode() in found, name


@pytest.mark.slow
def test_trackio_records_locally(tmp_path):
    pytest.importorskip("trackio")
    train(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    database = sqlite3.connect(tmp_path / "trackio" / "memdlm.db")
    rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
    logged = [row for row in rows if "train/loss" in row]
    assert len(logged) == 2
    assert {f"train/{name}" for name in FIGURES} <= logged[0].keys()
    ((name, config),) = database.execute("select run_name, config from configs")
    assert name == "a run"
    assert json.loads(config)["mem_inner_rank"] == 4


def test_a_missing_tracker_is_an_error_that_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report_to='trackio'.+pip install 'memdlm\[trackio\]'"):
        TrainingArguments(output_dir=str(tmp_path), report_to=["trackio"], use_cpu=True)
