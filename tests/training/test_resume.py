"""A killed run goes on as if nothing had happened; what cannot be gone on from is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chat_folder import make_chat, make_model
from memdlm.errors import CheckpointError, ConfigError
from memdlm.training.checkpoints import checkpoints_in, prepare_output
from memdlm.workflows.runs.resuming import differences

WORKER = Path(__file__).parents[1] / "train_worker.py"


def flags(folder, out, **more):
    options = {
        "model": str(folder / "model"),
        "dataset_args": str(folder / "chat.jsonl"),
        "output_dir": str(out),
        "lora": True,
        "r": 4,
        "lora_dropout": 0.1,
        "mem_enabled": True,
        "mem_inner_layer_fraction": 0.5,
        "mem_inner_rank": 4,
        "mem_inner_alpha": 8,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def start(argv, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(WORKER), json.dumps(options), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, 12 conversations (3 steps per epoch) and an unbroken run."""
    folder = tmp_path_factory.mktemp("resume")
    make_model(folder / "model")
    make_chat(folder / "chat.jsonl", 12)
    whole = start(flags(folder, folder / "whole"))
    assert whole.returncode == 0, whole.stderr
    return folder


def trained(out):
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("place", "at", "left"),
    [
        ("in a step", 5, "checkpoint-4"),
        pytest.param("before the optimizer is saved", 6, "checkpoint-4", marks=pytest.mark.slow),
        pytest.param("before the state is saved", 4, "checkpoint-2", marks=pytest.mark.slow),
        pytest.param("before the checkpoint is moved", 6, "checkpoint-4", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_place_ends_where_the_unbroken_one_does(place, at, left, folder, tmp_path):
    out = tmp_path / "run"
    killed = start(flags(folder, out), kill=place, at=at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints_in(out)[-1].name == left
    again = start(flags(folder, out, resume="latest"))
    assert again.returncode == 0, again.stderr
    expected, found = trained(folder / "whole"), trained(out)
    assert expected.keys() == found.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert not list(out.glob(".saving*"))
    histories = [
        json.loads((f / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        for f in (out, folder / "whole")
    ]
    timeless = [
        [{k: v for k, v in entry.items() if "per_second" not in k} for entry in h if "loss" in entry] for h in histories
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_a_path_is_gone_on_from_and_the_weights_matter(folder, tmp_path):
    out = tmp_path / "run"
    again = start(flags(folder, out, resume=folder / "whole" / "checkpoint-4"))
    assert again.returncode == 0, again.stderr
    expected, found = trained(folder / "whole"), trained(out)
    assert all(found[name].equal(expected[name]) for name in expected)
    early = trained(folder / "whole" / "checkpoint-4")
    assert not all(found[name].equal(early[name]) for name in early)


def test_starting_anew_beside_another_run_is_refused_in_one_line(folder, tmp_path):
    refused = start(flags(folder, folder / "whole"))
    assert refused.returncode == 2
    assert "holds checkpoint-8 of an earlier run" in refused.stderr.splitlines()[-1]
    assert (folder / "whole" / "checkpoint-8").is_dir()


def make_checkpoint(path, *files):
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text('{"global_step": 1}' if file == "trainer_state.json" else "")
    return path


def test_which_checkpoint_is_chosen(tmp_path):
    assert prepare_output(tmp_path, "never", overwrite=False) is None
    assert prepare_output(tmp_path, "latest", overwrite=False) is None
    (tmp_path / "run.json").write_text('{"memdlm": "0", "options": {}, "command": []}')
    for step in (2, 10, 9):
        make_checkpoint(tmp_path / f"checkpoint-{step}", "trainer_state.json", "optimizer.pt")
    make_checkpoint(tmp_path / ".saving" / "checkpoint-11", "trainer_state.json", "optimizer.pt")
    assert prepare_output(tmp_path, "latest", overwrite=False) == tmp_path / "checkpoint-10"
    assert prepare_output(tmp_path, str(tmp_path / "checkpoint-2"), overwrite=False) == tmp_path / "checkpoint-2"
    with pytest.raises(ConfigError, match="--resume latest"):
        prepare_output(tmp_path, "never", overwrite=False)
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        prepare_output(tmp_path, str(tmp_path / "checkpoint-3"), overwrite=False)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 10}')  # as a finished run leaves it
    with pytest.raises(
        CheckpointError, match=r"is the output folder of a run, not a checkpoint\. Name .*checkpoint-10'"
    ):
        prepare_output(tmp_path, str(tmp_path), overwrite=False)
    make_checkpoint(tmp_path / "checkpoint-12", "trainer_state.json", "model.safetensors")
    with pytest.raises(CheckpointError, match="save_only_model=True"):
        prepare_output(tmp_path, "latest", overwrite=False)
    assert prepare_output(tmp_path, "never", overwrite=True) is None
    assert not checkpoints_in(tmp_path)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_loaded(folder, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    out = tmp_path / "run"
    more["learning_rate"] = 0.3  # so large that the best one is not the last
    more["dataset_args"] = f"{folder / 'chat.jsonl'}[train:8,test:4]"
    done = start(flags(folder, out, **more))
    assert done.returncode == 0, done.stderr
    (kept,) = checkpoints_in(out)
    state = json.loads((kept / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == kept
    assert trained(out)[min(trained(out))].equal(trained(kept)[min(trained(kept))])
    assert torch.isfinite(torch.cat([value.flatten() for value in trained(out).values()])).all()


def test_options_that_make_another_run_of_it_are_refused_by_name(folder, tmp_path):
    out = tmp_path / "run"
    checkpoint = folder / "whole" / "checkpoint-4"
    refused = start(flags(folder, out, resume=checkpoint, learning_rate=0.02, mem_inner_lr=0.3, logging_steps=1))
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert "learning_rate was 0.01, now 0.02" in last
    assert "mem_inner_lr was 0.1, now 0.3" in last
    assert "--resume_changed" in last
    assert "logging_steps" not in last
    assert not (out / "run.json").exists()


@pytest.mark.slow
def test_what_is_logged_and_saved_may_change_and_does(folder, tmp_path):
    out = tmp_path / "run"
    checkpoint = folder / "whole" / "checkpoint-4"
    again = start(flags(folder, out, resume=checkpoint, logging_steps=1, save_steps=3, save_total_limit=1))
    assert again.returncode == 0, again.stderr
    expected, found = trained(folder / "whole"), trained(out)
    assert all(found[name].equal(expected[name]) for name in expected)
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-8"]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_a_change_that_is_asked_for_is_written_down(folder, tmp_path):
    out = tmp_path / "run"
    checkpoint = folder / "whole" / "checkpoint-4"
    more = {"resume": checkpoint, "resume_changed": True, "learning_rate": 0.02}
    again = start(flags(folder, out, **more))
    assert again.returncode == 0, again.stderr
    assert "resume: learning_rate was 0.01, now 0.02" in again.stderr
    run = json.loads((out / "run.json").read_text())
    assert run["changed_on_resume"] == ["learning_rate was 0.01, now 0.02"]


@pytest.mark.slow
def test_data_that_have_changed_are_noticed(folder, tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text((folder / "chat.jsonl").read_text())
    out = tmp_path / "run"
    first = start(flags(folder, out, dataset_args=chat, max_steps=2))
    assert first.returncode == 0, first.stderr
    make_chat(chat, 12, seed=1)
    refused = start(flags(folder, out, dataset_args=chat, max_steps=2, resume="latest"))
    assert refused.returncode == 2
    assert "the data, or the tokenizer they are encoded with, have changed" in refused.stderr.splitlines()[-1]


USUAL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "world_size": 1,
    "lr_scheduler_type": "cosine",
    "max_steps": 10,
    "mem_enabled": False,
}
RECUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "world_size": 2}
SHARED = {"mem_enabled": True, "mem_per_sample": False, "mem_sync_inner": None, "mem_outer_gradient": "first_order"}


@pytest.mark.parametrize(
    ("both", "now", "names"),
    [
        ({}, RECUT, []),
        ({}, {"world_size": 2}, ["world_size"]),
        ({"lora_dropout": 0.1}, RECUT, sorted(RECUT)),
        (SHARED, RECUT, sorted(RECUT)),
        (SHARED, {"per_device_train_batch_size": 1, "world_size": 2}, []),
        (SHARED | {"mem_sync_inner": False}, {"gradient_accumulation_steps": 2, "world_size": 2}, []),
        (SHARED | {"mem_sync_inner": False}, {"per_device_train_batch_size": 1, "world_size": 2}, 2),
        (SHARED | {"mem_per_sample": True}, RECUT, []),
        ({}, {"max_steps": 20}, ["max_steps"]),
        ({"lr_scheduler_type": "constant"}, {"max_steps": 20}, []),
        ({}, {"save_steps": 7, "report_to": ["wandb"], "eval_strategy": "steps", "dataloader_num_workers": 2}, []),
        ({}, {"eval_dataset_args": "x", "weight_decay": 0.5}, ["weight_decay"]),
    ],
    ids=str,
)
def test_which_options_make_another_run(both, now, names):
    found = [each.split(" was ")[0] for each in differences(USUAL | both, USUAL | both | now)]
    assert len(found) == names if isinstance(names, int) else found == names
