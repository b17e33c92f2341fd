"""Published layout and chat JSONL in; preprocess, train, merge, generate, each as its command; a model out."""

import json
import os
import subprocess
import sys

import pytest
import torch

from chat_folder import FAMILIES, make_chat, make_model, make_tokenizer
from memdlm.models import load_model

TINY = [
    *("--r", "4"),  # full fine-tunes leave the first two out
    *("--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"),
    *("--logging_steps", "1", "--use_cpu"),
]
MEMORY = [
    *("--mem_enabled", "True", "--mem_inner_layer_fraction", "0.5"),
    *("--mem_inner_rank", "4", "--mem_inner_alpha", "8"),
]


def memdlm(folder, *words, code=0):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MEMDLM_CACHE": str(folder / "index"),
    }
    command = [sys.executable, "-m", "memdlm", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4-bit LoRA with memory", "LoRA", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_conversations_to_a_model_that_answers(family, kind, tmp_path):
    if kind.startswith("4-bit"):
        pytest.importorskip("bitsandbytes")
    make_model(tmp_path / "model", family)
    make_chat(tmp_path / "chat.jsonl", 30)
    data = ["--dataset_args", "chat.jsonl[train:24,test:6]"]
    memdlm(tmp_path, "preprocess", "--model", "model", *data, "--output_dir", "data/chat", "--num_proc", 2)
    flags = {
        "4-bit LoRA with memory": ["--load_in_4bit", "True", "--lora", "True", *TINY, *MEMORY],
        "LoRA": ["--lora", "True", *TINY],
        "full": TINY[2:],
    }[kind]
    trained = memdlm(
        tmp_path, "train", "--model", "model", *data, "--load_preprocessed_data", "True", "--output_dir", "run", *flags
    )
    assert trained.stdout.splitlines()[-1] == "run"
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"]["counts"]["train"]["kept"] == 24
    assert list(run["data"]["manifest"]) == [str(tmp_path / "data" / "chat")]
    weights = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).is_file()
    final = "run"
    if kind != "full":
        memdlm(tmp_path, "merge", "--adapter", "run", "--output", "merged", "--dtype", "float32")
        final = "merged"
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        moved = (load_model(tmp_path / final)(ids).logits - load_model(tmp_path / "model")(ids).logits).abs().max()
        if kind == "LoRA":
            merged = load_model(tmp_path / final)(ids).logits
            assert torch.allclose(merged, load_model(tmp_path / "run")(ids).logits, atol=1e-4)
    assert moved > 1e-3
    answer = memdlm(tmp_path, "generate", "--model", final, "--max_new_tokens", 8, "w1 w2 w3")
    assert set(answer.stdout.split()) <= set(make_tokenizer().get_vocab())


@pytest.mark.slow
def test_a_full_fine_tune_saves_what_a_fresh_process_loads_strictly(tmp_path):
    make_model(tmp_path / "model", "lladamoe")
    make_chat(tmp_path / "chat.jsonl", 12)
    memdlm(
        tmp_path, "train", "--model", "model", "--dataset_args", "chat.jsonl", "--output_dir", "run", *TINY[2:], *MEMORY
    )
    script = (
        "import sys, torch; from memdlm.models import load_model; ids = torch.arange(5, 15)[None];"
        "print(load_model(sys.argv[1])(ids).logits.double().sum().item())"
    )
    again = subprocess.run(
        [sys.executable, "-c", script, "run"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # The last checkpoint was written from the same weights by another path.
    last = load_model(tmp_path / "run" / "checkpoint-3")
    with torch.no_grad():
        expected = last(torch.arange(5, 15)[None]).logits.double().sum().item()
    assert float(again.stdout.split()[-1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_a_malformed_line_stops_a_run_before_training(tmp_path):
    make_model(tmp_path / "model", "llada")
    (tmp_path / "chat.jsonl").write_text('{"prompt": "w1", "response": "w2"}\n{"prompt": \n')
    done = memdlm(
        tmp_path, "train", "--model", "model", "--dataset_args", "chat.jsonl", "--output_dir", "run", *TINY[2:], code=2
    )
    assert "chat.jsonl, line 2 is no JSON" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
