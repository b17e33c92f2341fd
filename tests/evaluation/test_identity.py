"""Caches of an evaluation: an answer is served only to the model, memory and decoding that gave it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from memdlm.cli.main import main
from memdlm.errors import ConfigError
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.evaluation.identity import settings_identity
from memdlm.evaluation.longctx import parse_lengths

pytest.importorskip("lm_eval")
MODEL = str(Path(__file__).parents[1] / "golden" / "llada" / "checkpoint")
METADATA = '{"max_seq_lengths": [32], "num_samples": 1}'


def identity(**arguments):
    return settings_identity(parse_arguments({"pretrained": MODEL, **arguments}))


def test_everything_that_an_answer_depends_on_counts():
    settings = [
        {},
        {"steps": 2},
        {"request_seed": 1},
        {"dtype": "float32"},
        {"add_special_tokens": True},
        {"mem_enabled": True},
        {"mem_enabled": True, "mem_inner_lr": 0.5},
        {"tokenizer": MODEL},
    ]
    assert len({identity(**each) for each in settings}) == len(settings)
    assert identity(steps=2) == identity(steps="2")


def test_other_weights_in_the_same_folder_count(tmp_path):
    shutil.copytree(MODEL, tmp_path / "m")
    before = identity(pretrained=str(tmp_path / "m"))
    weights = next((tmp_path / "m").glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert identity(pretrained=str(tmp_path / "m")) != before


def evaluate(out, *options):
    assert main(["eval", "--model", MODEL, "--tasks", "memdlm_kv", "--limit", "1", "--output_path", out, *options]) == 0
    found = json.loads(next(Path(out).rglob("results*.json")).read_text())
    return found["config"]["memdlm"]["cost"]["requests"]


def test_a_cache_serves_the_same_settings_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "cache"))
    cached = ["--use_cache", "answers", "--metadata", METADATA, "--gen_kwargs", "max_gen_toks=2"]
    assert evaluate("first", *cached) == 1
    assert evaluate("again", *cached) == 0
    assert evaluate("other", *cached, "--steps", "1") == 1


@pytest.mark.slow
def test_requests_of_other_lengths_are_not_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "cache"))
    seen = {}
    for length in (32, 64):
        metadata = json.dumps({"max_seq_lengths": [length], "num_samples": 1})
        options = ["--cache_requests", "--log_samples", "--metadata", metadata, "--gen_kwargs", "max_gen_toks=2"]
        evaluate(str(length), *options)
        sample = json.loads(next(Path(str(length)).rglob("samples*")).read_text().splitlines()[0])
        seen[length] = len(str(sample["arguments"]))
    assert seen[64] > seen[32]


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("1k", [1024]), ("4K", [4096]), ("1024", [1024]), (512, [512]), (["1k", 2048, "3K"], [1024, 2048, 3072])],
)
def test_lengths_are_written_in_several_ways(given, lengths):
    assert parse_lengths(given) == lengths


@pytest.mark.parametrize(
    "given", ["1q", "", "k", [], ["1k", None], -1, 0, "1e3", 1.5, True, [[1]], 10**9, [1024, "1k"]]
)
def test_other_lengths_are_refused(given):
    with pytest.raises(ConfigError, match="max_seq_lengths"):
        parse_lengths(given)


@pytest.mark.slow
def test_a_mistyped_task_is_guessed(capsys):
    assert main(["eval", "--model", MODEL, "--tasks", "memdlm_kvv"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "tasks: 'memdlm_kvv' is not known. Did you mean 'memdlm_kv'?" in line


@pytest.mark.slow
def test_data_that_only_the_hub_has_is_said(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert main(["eval", "--model", MODEL, "--tasks", "babilong_qa1", "--metadata", '{"max_seq_lengths": "1k"}']) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "tasks 'babilong_qa1': their data comes from the network" in line
