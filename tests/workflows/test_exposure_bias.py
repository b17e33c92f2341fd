"""The exposure-bias command: both models, without and with memory, on the same masks."""

import json

import pytest

from memdlm.cli.main import main
from memdlm.data import KeyValueRecall, build_word_tokenizer, write_jsonl
from memdlm.models import SmallDLMConfig, build_model

TASK = KeyValueRecall(wording="symbols", num_pairs=3, num_keys=6, num_values=6, num_questions=3)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bias")
    tokenizer = build_word_tokenizer(TASK.words())
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        config = SmallDLMConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2
        )
        build_model(config, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    build_word_tokenizer([*TASK.words(), "aaa"]).save_pretrained(folder / "other")
    write_jsonl(({"messages": sample.messages} for sample in TASK.records(6, 16, seed=0)), folder / "rows.jsonl")
    return folder


def command(start, *options, model="a"):
    data = () if "--dataset_args" in options else ("--dataset_args", str(start / "rows.jsonl"))
    rows = [*data, "--train_turns", "all", "--steps", "4"]
    return ["exposure-bias", "--model", str(start / model), *rows, *options]


def test_two_models_with_and_without_memory(start, tmp_path, capsys):
    options = ["--model2", str(start / "b"), "--mem_enabled", "True", "--output", str(tmp_path), "--batch_size", "2"]
    assert main(command(start, *options)) == 0
    data = json.loads((tmp_path / "exposure_bias.json").read_text())
    rows = {(row["model"], row["memory"]): row for row in data["exposure_bias"]}
    assert list(rows) == [(str(start / name), memory) for name in ("a", "b") for memory in (False, True)]
    for row in rows.values():
        assert row["step"] == [0, 1, 2, 3]
        # Nothing is decoded yet: the three are one.
        assert row["static"][0] == pytest.approx(row["sequential"][0]) == pytest.approx(row["matched"][0])
    assert (tmp_path / "exposure_bias.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("max matched ratio") == 4


def test_equal_models_on_equal_masks_give_equal_numbers(start, tmp_path):
    assert main(command(start, "--model2", str(start / "copy"), "--output", str(tmp_path))) == 0
    first, second = json.loads((tmp_path / "exposure_bias.json").read_text())["exposure_bias"]
    assert {**first, "model": ""} == {**second, "model": ""}


def test_batches_change_nothing(start, tmp_path):
    found = []
    for size in ("1", "6"):
        options = ["--batch_size", size, "--mem_enabled", "True", "--output", str(tmp_path / size)]
        assert main(command(start, *options)) == 0
        found.append(json.loads((tmp_path / size / "exposure_bias.json").read_text())["exposure_bias"])
    for alone, together in zip(*found, strict=True):
        for name in ("static", "sequential", "matched"):
            assert alone[name] == pytest.approx(together[name], rel=1e-5)


def test_what_can_be_trained_on_can_be_measured_on(start, tmp_path):
    """The grammar of training: mixtures, limits, held-out parts; the test split unless another is named."""
    rows = start / "rows.jsonl"
    mixture = f"{rows}[train:2,test:3]+{rows}[train:1,test:1]"
    found = {}
    for name, options in (("test", ()), ("train", ("--split", "train"))):
        out = tmp_path / name
        assert main(command(start, "--dataset_args", mixture, "--output", str(out), *options)) == 0
        found[name] = json.loads((out / "exposure_bias.json").read_text())
    assert [(found[name]["split"], found[name]["conversations"]) for name in found] == [("test", 4), ("train", 3)]
    assert found["test"]["exposure_bias"] != found["train"]["exposure_bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "validation"], "split 'validation' is not known. Possible: train."),
        (["--model2", "a"], "model2 is the same as model"),
        (["--model2", "other"], "has another tokenizer"),
        (["--max_length", "3"], "none of the 6 conversations"),
        (["--mem_inner_lr", "0.5"], "mem_inner_lr=0.5 has no effect without memory; add --mem_enabled True."),
        (["--stepz", "3"], "option '--stepz' is not known. Did you mean '--steps'?"),
    ],
)
def test_bad_input_is_one_line(start, tmp_path, options, message, capsys):
    options = [str(start / each) if each in ("a", "other") else each for each in options]
    assert main(command(start, "--output", str(tmp_path), *options)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
