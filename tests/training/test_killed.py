"""Full fine-tuning that is killed in the middle of a step goes on as if nothing had happened."""

import random
import signal

import pytest
from safetensors.torch import load_file
from test_resume import start

from chat_folder import make_chat, make_model
from memdlm.cli.main import main
from memdlm.models import load_model
from memdlm.training.checkpoints import checkpoints_in

STEPS = 5


def flags(folder, out, **more):
    options = {
        **{"model": folder / "model", "dataset_args": folder / "chat.jsonl", "output_dir": folder / out},
        **{"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True},
        **{"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True},
        **more,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        ("lladamoe", 0),
        *(pytest.param(family, seed, marks=pytest.mark.slow) for family in ("llada", "llada2") for seed in (1, 2)),
        pytest.param("lladamoe", 3, marks=pytest.mark.slow),
    ],
)
def test_the_final_weights_are_those_of_the_unbroken_run(family, seed, tmp_path):
    at = random.Random(seed).randrange(1, STEPS)
    make_model(tmp_path / "model", family)
    make_chat(tmp_path / "chat.jsonl", 12)
    assert main(["train", *flags(tmp_path, "whole")]) == 0
    killed = start(flags(tmp_path, "run"), kill="in a step", at=at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = checkpoints_in(tmp_path / "run")[-1]
    assert left.name == f"checkpoint-{at}"
    assert main(["train", *flags(tmp_path, "run", resume="latest")]) == 0
    expected, found, base, reached = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "whole", tmp_path / "run", tmp_path / "model", left)
    )
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    experts = [name for name in expected if "expert" in name] or list(expected)
    assert any(not reached[name].equal(base[name]) for name in experts), "there was something to lose"
    assert load_model(tmp_path / "run").dtype == load_model(tmp_path / "model").dtype
