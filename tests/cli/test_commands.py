"""Commands: help on every option, bad input is one clear line and status 2, good input does the job."""

import json
import subprocess
import sys

import pytest

from memdlm.cli.main import COMMANDS, main
from memdlm.data import KeyValueRecall, build_word_tokenizer, write_jsonl
from memdlm.models import SmallDLMConfig, build_model, load_model

TASK = KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=4, num_questions=1)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model with its tokenizer, and a dataset."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = build_word_tokenizer(TASK.words())
    config = SmallDLMConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    build_model(config, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(({"messages": sample.messages} for sample in TASK.records(8, 10, seed=0)), folder / "rows.jsonl")
    return folder


def recipe(start, folder, **options):
    path = folder / "recipe.yaml"
    values = {
        "model": str(start / "model"),
        "dataset_args": str(start / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return str(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_its_options(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: memdlm {command}" in text
    assert "--" in text


def test_the_command_lists_the_commands(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text and what in text for name, what in COMMANDS.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss_norm_type", "tokn"], "loss_norm_type: 'tokn' is not known. Possible: token, sequence, batch."),
        (["--learnig_rate", "1"], "option '--learnig_rate' is not known. Did you mean '--learning_rate'?"),
        (["--max_steps", "x"], "invalid int value: 'x'"),
        (["--train_turns", "first"], "train_turns: 'first' is not known. Possible: last, all."),
        (["--mem_inner_lr", "3"], "mem_inner_lr=3.0 has no effect without memory"),
        (
            ["--mem_enabled", "True", "--mem_inner_target_modules", "down_porj"],
            "mem_inner_target_modules names 'down_porj'",
        ),
        (["--dataset_args", "/nowhere.jsonl"], "dataset: '/nowhere.jsonl' does not exist."),
        (["--model", "./nowhere"], "the folder './nowhere' does not exist"),
        (["--max_length", "1"], "none has a token to learn within max_length 1"),
        (["--eval_strategy", "steps"], "eval_dataset_args"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, message, start, tmp_path, capsys):
    assert main(["train", recipe(start, tmp_path), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("memdlm train: error: ")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"messages": [{"role": "user", "content": "k0 is"}]}', "row 0: the conversation has no assistant turn"),
        ('{"body": "k0"}', "row 0 has neither a list of 'messages' ("),
        ("{", "line 1 is no JSON"),
    ],
)
def test_bad_data_is_refused_before_training(text, message, start, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(text)
    assert main(["train", recipe(start, tmp_path, dataset_args=tmp_path / "bad.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_bad_recipe_is_refused(start, tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "is no file" in capsys.readouterr().err
    path = recipe(start, tmp_path, learnig_rate=1)
    assert main(["train", path]) == 2
    assert "recipe.yaml: option 'learnig_rate' is not known. Did you mean 'learning_rate'?" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main(["train", str(tmp_path / "list.yaml")]) == 2
    assert "must be a mapping" in capsys.readouterr().err


def test_a_tokenizer_without_mask_token_is_refused(start, tmp_path, capsys):
    folder = tmp_path / "maskless"
    load_model(start / "model").save_pretrained(folder)
    for path in (start / "model").glob("tokenizer*"):
        (folder / path.name).write_text(path.read_text().replace("<|mask|>", "<|gone|>"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("mask_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(["train", recipe(start, tmp_path, model=folder)]) == 2
    assert "mask token" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["dmeo"]) == 2
    assert "command 'dmeo' is not known" in capsys.readouterr().err
    assert main(["demo", "--qiuck"]) == 2
    assert "option '--qiuck' is not known. Did you mean '--quick'?" in capsys.readouterr().err


def test_training_leaves_a_model_that_loads_and_generates(start, tmp_path, capsys):
    assert main(["train", recipe(start, tmp_path), "--mem_enabled", "True"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    capsys.readouterr()
    command = [sys.executable, "-m", "memdlm", "generate", "--model", str(tmp_path / "out"), "--max_new_tokens", "3"]
    out = subprocess.run(
        [*command, "--mem_enabled", "True", "k0 is v1 k0 is"], capture_output=True, text=True, check=True
    )
    assert out.stdout.count("\n") == 1
