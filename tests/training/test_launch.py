"""The launch configurations start what they say: two processes, which train what one trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from chat_folder import make_chat, make_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_cpu_configuration_starts_two_processes_that_train_the_joined_batch(tmp_path):
    make_model(tmp_path / "model", "llada")
    make_chat(tmp_path / "chat.jsonl", 16)
    weights = []
    for processes, rows in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        flags = ["--model", "model", "--dataset_args", "chat.jsonl", "--output_dir", str(out), "--max_steps", "3"]
        flags += ["--per_device_train_batch_size", str(rows), "--learning_rate", "1e-2", "--save_strategy", "no"]
        flags += ["--dtype", "float64", "--supervise_padding", "none", "--report_to", "none", "--use_cpu", "True"]
        flags += ["--mem_enabled", "True", "--mem_inner_layer_fraction", "0.5", "--mem_inner_rank", "4"]
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "src/memdlm/recipes/accelerate/cpu.yaml"),
        ]
        start = [sys.executable, *(launch if processes > 1 else []), "-m", "memdlm", "train", *flags]
        done = subprocess.run(
            start,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f'"world_size": {processes}' in (out / "run.json").read_text()
        weights.append(load_file(out / "model.safetensors"))
    one, two = weights
    assert all(value.dtype == torch.float64 for value in one.values())
    for name, value in one.items():
        assert_close(two[name], value, rtol=1e-6, atol=1e-8, msg=name)
