"""lm-eval's command line with our models: fresh processes, one and two of them, results files, mistakes in one line."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from memdlm.cli.main import main
from memdlm.data import KeyValueRecall, build_word_tokenizer
from memdlm.models import SmallDLMConfig, build_model

pytest.importorskip("lm_eval")

TASK = KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=4, num_questions=2)
METADATA = json.dumps(
    {
        "max_seq_lengths": [12, 20],
        "num_samples": 5,
        "task_options": {"kv": {"num_pairs": 2, "num_keys": 4, "num_values": 4, "num_questions": 2}},
    }
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "model"
    tokenizer = build_word_tokenizer(TASK.words())
    config = SmallDLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.3
    )
    build_model(config, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def environment():
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)


def results_in(folder):
    """The results file and the answers, in the order of the documents."""
    results = json.loads(next(folder.glob("**/results_*.json")).read_text())
    lines = next(folder.glob("**/samples_*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return results, [sample["resps"] for sample in samples]


def test_the_front_evaluates_and_writes_what_it_did(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["eval", "--model", checkpoint, "--tasks", "memdlm_kv", "--metadata", METADATA, "--device", "cpu"]
    options = ["--mem_enabled", "True", "--mem_inner_rank", "4", "--extra_model_args", "steps=3,mem_inner_lr=0.2"]
    output = ["--output_path", str(tmp_path), "--log_samples", "--batch_size", "3", "--apply_chat_template"]
    assert main([*command, *options, *output]) == 0
    results, answers = results_in(tmp_path)
    found = results["results"]["memdlm_kv"]
    assert len(answers) == 20
    assert found["chance,none"] == 0.25
    assert found["exact_match,none"] == pytest.approx((found["12,none"] + found["20,none"]) / 2)
    told = results["config"]["memdlm"]
    assert (told["generation"], told["memory"]["inner_rank"], told["memory"]["inner_lr"]) == ({"steps": 3}, 4, 0.2)
    assert (told["cost"]["requests"], told["cost"]["writes"]) == (20, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mem_inner_rnk", "4"], "option '--mem_inner_rnk' is not known. Did you mean '--mem_inner_rank'?"),
        (["--metadat", "{}"], "option '--metadat' is not known. Did you mean '--metadata'?"),
        (["--steps", "x"], "steps='x' is not valid"),
        (["--mem_inner_rank", "4"], "mem_inner_rank=4 has no effect without memory; add mem_enabled=True."),
        (["--extra_model_args", "stpes=4"], "model argument 'stpes' is not known."),
        (["--batch_size", "auto"], "batch_size must be a whole number, got 'auto'"),
        (["--tasks", "memdlm_kvv"], "--tasks is given twice"),
        (["--limit", "1", "--limit", "2"], "--limit is given twice"),
        (["--limit", "1e30"], "limit: 1e+30 is no number of documents"),
        (["--limit", "2.5"], "limit: 2.5 is no number of documents"),
        (["--num_fewshot", "-1"], "num_fewshot: -1 is not possible"),
        (["--batch_size", "1000000000"], "batch_size must be from 1 to 65536"),
        (["--metadata", "{"], "option"),
        (["--metadata", '{"max_seq_lengths": "1q"}'], "max_seq_lengths='1q' is no list of lengths"),
        (["--metadata", '{"num_samples": 0}'], "num_samples=0 must be a whole number"),
        (["--device", "tpu9"], "device: 'tpu9' is no device"),
        (["--log_samples"], "Specify --output_path"),
        (["--write_out", "--mem_enabled", "True", "--mem_outer_mix", "0.5"], "only training reads"),
    ],
)
def test_mistakes_are_one_line(checkpoint, options, message, capsys):
    assert main(["eval", "--model", checkpoint, "--tasks", "memdlm_kv", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("memdlm eval: error: ")
    assert message in error


def test_a_model_that_is_not_there_is_named(capsys):
    assert main(["eval", "--model", "./nowhere", "--tasks", "memdlm_kv"]) == 2
    assert "the folder './nowhere' does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_the_entry_points_name_the_class():
    found = {each.name: each.value for each in entry_points(group="lm_eval.models") if "memdlm" in each.value}
    if not found:
        pytest.skip("the installed package is older than the entry points")
    assert found == dict.fromkeys(("memdlm", "llada", "llada21"), "memdlm.evaluation.harness:MemDLM")


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["False", "True"])
def test_results_are_the_same_for_all_batch_sizes_and_two_processes(checkpoint, tmp_path, memory):
    code = "import sys; from memdlm.cli.eval import stock; sys.exit(stock())"
    script = tmp_path / "harness.py"
    script.write_text(code)
    arguments = ["--model_args", f"pretrained={checkpoint},mem_enabled={memory}", "--tasks", "memdlm_longctx"]
    arguments += ["--metadata", '{"max_seq_lengths": [120], "num_samples": 3}', "--device", "cpu", "--log_samples"]
    found = {}
    launch = {name: [sys.executable, str(script)] for name in ("1", "3", "8")}
    launch["two"] = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29577"]
    launch["two"].append(str(script))
    for model, (name, start) in zip(("memdlm", "llada", "llada21", "memdlm"), launch.items(), strict=True):
        out = tmp_path / name
        size = name if name != "two" else "3"
        done = run(*start, "--model", model, *arguments, "--batch_size", size, "--output_path", str(out))
        assert done.returncode == 0, done.stderr[-2000:]
        results = json.loads(next(out.glob("**/results_*.json")).read_text())
        samples = [
            json.loads(line) for file in sorted(out.glob("**/samples_*")) for line in file.read_text().splitlines()
        ]
        answers = sorted((sample["prompt_hash"], sample["doc_id"], sample["filtered_resps"]) for sample in samples)
        scores = {task: values["exact_match,none"] for task, values in results["results"].items()}
        found[name] = (answers, scores)
    assert len(found["1"][0]) >= 18
    assert found["1"] == found["3"] == found["8"] == found["two"]
