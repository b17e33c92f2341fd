"""Every command that loads a model goes where the rule says, in the dtype it says, and says so once, at first."""

import importlib
import json
import re
from unittest import mock

import pytest
import torch
import transformers

from memdlm.cli.main import COMMANDS, main
from memdlm.data import KeyValueRecall, build_word_tokenizer, write_jsonl
from memdlm.models import LoRAOptions, SmallDLMConfig, add_outer_lora, build_model, load_model
from memdlm.models.hub import devices, loading
from memdlm.models.hub.devices import trains_on_the_cpu
from memdlm.models.lora.files import save_outer_adapter
from memdlm.training import TrainingArguments
from memdlm.workflows.studies import demo

TASK = KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=4, num_questions=1)
TINY_SUITE = json.dumps({"max_seq_lengths": [12], "num_samples": 1, "task_options": {"kv": {"num_pairs": 2}}})
WITHOUT_MODEL = ("info", "preprocess", "memory", "report", "recipes", "completion")
"""Commands that load no weights, which `test_the_others_load_no_weights` holds them to."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model published in bfloat16, an adapter, a memory, and texts."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = build_word_tokenizer(TASK.words())
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    for seed, name in enumerate(("model", "other")):
        model = build_model(SmallDLMConfig(vocab_size=len(tokenizer), **sizes), seed=seed)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    base = str(folder / "model")
    save_outer_adapter(add_outer_lora(load_model(base), LoRAOptions(r=2), seed=0, base=base), folder / "adapter")
    write_jsonl(({"messages": sample.messages} for sample in TASK.records(8, 10, seed=0)), folder / "rows.jsonl")
    write_jsonl([{"question": "k0 is"}, {"question": "k1 is"}], folder / "questions.jsonl")
    (folder / "doc.txt").write_text("k0 is v1 k1 is v2")
    command = ["memorize", "--model", base, "--file", str(folder / "doc.txt"), "--device", "cpu"]
    assert main([*command, "--output", str(folder / "doc.mem")]) == 0
    return folder


def words_of(command, inputs, out):
    """A command line that does a command's work, on little."""
    model = ["--model", str(inputs / "model")]
    short = [*model, "--max_new_tokens", "2", "--steps", "2"]
    data = [*model, "--dataset_args", str(inputs / "rows.jsonl")]
    train = ["--max_steps", "1", "--report_to", "none", "--use_cpu", "True", "--disable_tqdm", "True"]
    asked = ["--memory", str(inputs / "doc.mem"), "--questions", str(inputs / "questions.jsonl")]
    tasks = ["--tasks", "memdlm_kv", "--metadata", TINY_SUITE, "--limit", "1", "--max_new_tokens", "2"]
    return {
        "demo": ["--quick", "--out", str(out)],
        "train": [*data, *train, "--output_dir", str(out)],
        "generate": [*short, "k0 is", "k1 is v1"],
        "infill": [*model, "--steps", "1", "k0 <|mask|>"],
        "chat": [*short],
        "memorize": [*model, "--file", str(inputs / "doc.txt"), "--output", str(out)],
        "ask": [*short, *asked],
        "eval": [*model, *tasks],
        "exposure-bias": [*data, "--model2", str(inputs / "other"), "--steps", "1", "--output", str(out)],
        "serve": [*model, "--port", "0"],
        "merge": ["--adapter", str(inputs / "adapter"), "--output", str(out)],
    }[command]


LOADING = tuple(name for name in COMMANDS if name not in (*WITHOUT_MODEL, "convert"))
"""Conversion computes nothing, so it has no device: it reads weights and writes them."""
NAMED = tuple(name for name in LOADING if name != "train")
"""Commands that take --device; of training's, transformers decides, and its use_cpu."""
READING = tuple(name for name in NAMED if name != "demo")
"""Those that load a checkpoint; the demo makes its models."""


@pytest.fixture(autouse=True)
def _servers_end(monkeypatch):
    """A server is made ready, and ends at once."""
    monkeypatch.setattr("memdlm.serving.http.running.Server.run", lambda *_, **__: None)


@pytest.fixture
def asked(monkeypatch):
    """What every model is asked for; it is then loaded to the CPU."""
    found, read = [], loading._read

    def record(loader, name, config, given):
        found.append((str(given.get("device_map", {}).get("")), given["dtype"]))
        return read(loader, name, config, {key: each for key, each in given.items() if key != "device_map"})

    monkeypatch.setattr(loading, "_read", record)
    return found


def flags_of(command):
    """The flags of a command's parser, by name."""
    found = []
    with mock.patch("argparse.ArgumentParser.print_help", lambda self, file=None: found.append(self)):
        with pytest.raises(SystemExit):
            importlib.import_module(f"memdlm.cli.{command.replace('-', '_')}").main(["--help"])
    return {flag: action for action in found[0]._actions for flag in action.option_strings}


@pytest.mark.parametrize("command", LOADING)
def test_every_command_has_the_rule(command):
    flags = flags_of(command)
    if command == "train":
        assert "--device" not in flags
        assert "--use_cpu" in flags
    else:
        assert "auto: a CUDA card if there is one" in flags["--device"].help
        assert command == "eval" or flags["--device"].default == "auto"
    if command == "merge":
        assert flags["--dtype"].default == "bfloat16", "of what is written"
    elif command != "demo":
        assert "auto: the checkpoint's own if the device can compute in it" in flags["--dtype"].help
        assert command == "eval" or flags["--dtype"].default == "auto"


MACHINES = {
    "a CPU": ({}, "None", "auto"),
    "cards": ({"cuda": 2}, "cuda", "auto"),
    "a rank": ({"cuda": 2, "LOCAL_RANK": "1"}, "cuda:1", "auto"),
    "an old card": ({"cuda": 1, "capability": (7, 5)}, "cuda", torch.float32),
    "a Mac": ({"mps": True}, "None", "auto"),
}
RUNS = [(command, name) for command in READING for name in ("a rank", "an old card")]
RUNS += [("generate", name) for name in MACHINES if ("generate", name) not in RUNS]
# lm-eval takes seconds to say anything.
RUNS = [pytest.param(*run, marks=pytest.mark.slow) if run == ("eval", "a rank") else run for run in RUNS]


@pytest.mark.parametrize(("command", "name"), RUNS)
def test_models_go_where_the_rule_says(command, name, inputs, machine, asked, tmp_path, monkeypatch):
    there, device, dtype = MACHINES[name]
    if command == "eval":
        pytest.importorskip("lm_eval")
        # A launcher would set all of its variables; accelerate waits for the other processes if it sees one.
        monkeypatch.setattr("memdlm.evaluation.harness.PartialState", Alone)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=["k0 is", EOFError]))
    machine(**there)
    assert main([command, *words_of(command, inputs, tmp_path / "out")]) == 0
    # What is merged is summed as it was published.
    wanted = torch.bfloat16 if command == "merge" else dtype
    assert asked == [(device, wanted)] * (2 if command == "exposure-bias" else 1)


class Alone:
    """What accelerate says of one process."""

    def __init__(self, **_):
        self.process_index, self.num_processes, self.device = 0, 1, torch.device("cpu")


@pytest.mark.parametrize(
    ("there", "device"),
    [({}, "cpu"), ({"cuda": 2}, "cuda"), ({"cuda": 2, "LOCAL_RANK": "0"}, "cuda:0"), ({"mps": True}, "cpu")],
)
def test_the_demos_models_go_where_the_rule_says(there, device, inputs, machine, tmp_path, monkeypatch):
    plans = []

    def run_demo(plan, *_, **__):
        plans.append(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr("memdlm.cli.demo.run_demo", run_demo)
    machine(**there)
    assert main(["demo", *words_of("demo", inputs, tmp_path / "out")]) == 130
    (plan,) = plans
    assert plan.device == torch.device(device)
    assert plan.recall.training["use_cpu"] == (device == "cpu")
    machine(cuda=2, LOCAL_RANK="1")
    assert main(["demo", *words_of("demo", inputs, tmp_path / "out")]) == 2, "training would take the first"


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_training_loads_what_its_card_computes_in(capability, dtype, inputs, machine, tmp_path, monkeypatch, capsys):
    asked = []

    def make_model(options, lora, seed, weights, device):
        asked.append((weights, device))
        raise KeyboardInterrupt

    machine(cuda=1, capability=capability)
    settle = transformers.TrainingArguments.device.fget

    def card(self):
        settle(self)
        return torch.device("cuda:0")

    monkeypatch.setattr(transformers.TrainingArguments, "device", property(card))
    monkeypatch.setattr("memdlm.workflows.runs.train.make_model", make_model)
    assert main(["train", *words_of("train", inputs, tmp_path / "out"), "--bf16", "True"]) == 130
    assert asked == [(dtype, torch.device("cuda:0"))]
    said = f"device cuda:0 (card 0), weights in {str(dtype)[6:]}, products in bfloat16 (autocast), attention sdpa"
    assert said in capsys.readouterr().err


def test_training_stays_on_the_cpu_where_mps_fails_its_probe(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    machine(mps=True)
    assert TrainingArguments(output_dir=str(tmp_path), report_to="none").use_cpu
    monkeypatch.setattr(devices, "problem_of", lambda *_: None)
    machine(mps=True)
    assert not trains_on_the_cpu()
    machine(cuda=1)
    assert not trains_on_the_cpu()


@pytest.mark.parametrize("command", NAMED)
def test_a_named_device_that_is_not_there_is_one_line(command, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if command == "eval":
        pytest.importorskip("lm_eval")
    assert main([command, *words_of(command, inputs, tmp_path / "out"), "--device", "cuda:0"]) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith(f"memdlm {command}: error: device: 'cuda:0' is not there")


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.slow if name == "eval" else ()) for name in LOADING if name != "demo"],
)
def test_the_line_is_said_once_on_standard_error_before_the_work(
    command, inputs, tmp_path, machine, monkeypatch, capsys
):
    if command == "eval":
        pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=["k0 is", EOFError]))
    capsys.readouterr()
    assert main([command, *words_of(command, inputs, tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    line = "device cpu, weights in bfloat16, attention sdpa"
    # transformers shows how far the reading of weights is, and lm-eval has a log.
    said = [
        each for each in re.split(r"[\n\r]+", err) if each and not re.match(r"Loading weights|\d{4}-\d\d-\d\d:", each)
    ]
    assert said.count(line) == err.count("device cpu") == 1
    assert said[0] == line
    assert "device cpu" not in out
    if command == "ask":
        assert [set(json.loads(row)) for row in out.splitlines()] == [{"question", "response"}] * 2


def test_the_demo_says_it_before_it_makes_data(inputs, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_make_data", stop)
    assert main(["demo", *words_of("demo", inputs, tmp_path / "out"), "--device", "cpu"]) == 130
    assert capsys.readouterr().err.splitlines()[0] == "device cpu, weights in float32, attention sdpa"


@pytest.mark.parametrize("command", WITHOUT_MODEL)
def test_the_others_load_no_weights(command, inputs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    if command == "report":
        assert main(["train", *words_of("train", inputs, run)]) == 0
    words = {
        "info": [str(inputs / "model")],
        "memory": ["list", str(inputs)],
        "preprocess": [
            *("--model", str(inputs / "model"), "--dataset_args", str(inputs / "rows.jsonl")),
            *("--output_dir", str(tmp_path / "data")),
        ],
        "report": [str(run), "--output", str(tmp_path / "report.html")],
        "recipes": [],
        "completion": ["bash"],
    }[command]
    monkeypatch.setattr(loading, "_read", mock.Mock(side_effect=AssertionError("weights were read")))
    assert main([command, *words]) == 0
    assert "--device" not in flags_of(command)


def test_a_card_of_its_own_for_every_process_of_an_evaluation(monkeypatch, machine):
    harness = pytest.importorskip("memdlm.evaluation.harness")
    errors = importlib.import_module("memdlm.errors")
    state = Alone()
    assert [harness._device(name, state) for name in (None, "auto", "cuda:0", "cpu", "mps")] == [
        *("auto", "auto", "auto", "cpu", "mps")
    ]
    state.num_processes, state.device = 2, torch.device("cuda:1")
    assert {harness._device(name, state) for name in (None, "auto", "cuda")} == {state.device}
    assert harness._device("cpu", state) == "cpu"
    with pytest.raises(errors.ConfigError, match="device='cuda:1' with 2 processes"):
        harness._device("cuda:1", state)
