"""The rule behind "auto": which device, which dtype, on machines with and without CUDA and MPS."""

import json
import logging

import pytest
import torch

from memdlm.errors import ConfigError, MachineError
from memdlm.models import devices, load_model, loading
from memdlm.models.adapter_files import save_outer_adapter
from memdlm.models.devices import choose_device, choose_dtype, job_line, problem_of, trains_on_the_cpu
from memdlm.models.outer_adapters import LoRAOptions, add_outer_lora
from memdlm.models.resolution import published_dtype, resolve_config
from tiny import random_ids, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVERY_DTYPE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({}, "cpu"),
        ({"LOCAL_RANK": "1"}, "cpu"),
        ({"cuda": 1}, "cuda"),
        ({"cuda": 8}, "cuda"),
        ({"cuda": 8, "mps": True}, "cuda"),
        ({"cuda": 8, "LOCAL_RANK": "3"}, "cuda:3"),
        ({"cuda": 1, "LOCAL_RANK": "3"}, "cuda:0"),
        ({"cuda": 8, "LOCAL_RANK": "3", "ACCELERATE_USE_CPU": "true"}, "cpu"),
        ({"mps": True}, "cpu"),
    ],
)
def test_the_device_follows_from_the_machine(there, chosen, machine):
    machine(**there)
    assert choose_device("auto") == torch.device(chosen)
    assert choose_device("cpu") == CPU, "a name is a name"


def test_a_rank_that_is_none_is_refused(machine):
    machine(cuda=8, LOCAL_RANK="first")
    with pytest.raises(ConfigError, match="LOCAL_RANK='first' is no number"):
        choose_device("auto")


def test_mps_is_taken_only_if_everything_runs_on_it_and_the_log_says_why_not(machine, monkeypatch, caplog):
    machine(mps=True)  # this torch has none: the first operation fails
    assert [choose_device("auto"), choose_device("auto")] == [CPU, CPU]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("MPS is there, but not all that memdlm needs runs on it (a matrix product in float32: ")
    assert said.endswith("the CPU is used.")
    assert trains_on_the_cpu()
    machine(mps=True)
    tried = []
    monkeypatch.setattr(devices, "problem_of", lambda device, dtype: tried.append((device.type, dtype)))
    assert choose_device("auto", dtype=torch.bfloat16) == torch.device("mps")
    assert tried == [("mps", torch.bfloat16)]
    caplog.clear()
    assert choose_device("auto", load_in_4bit=True) == CPU
    assert "4-bit" in caplog.text


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_the_probe_passes_where_all_of_it_runs(dtype):
    assert problem_of(CPU, dtype) is None


@pytest.mark.parametrize(
    ("broken", "words"),
    [("_multiply", "a matrix product in bfloat16"), ("_sort_and_count", "int64"), ("_sum_widely", "float64")],
)
def test_the_probe_names_what_fails(broken, words, monkeypatch):
    monkeypatch.setattr(devices, broken, lambda *_: False)
    assert words in problem_of(CPU, torch.bfloat16)
    assert problem_of(CPU, torch.bfloat16).endswith("the result is wrong")

    def fail(*_):
        raise NotImplementedError("no such\n  kernel")

    monkeypatch.setattr(devices, broken, fail)
    assert problem_of(CPU, torch.bfloat16).endswith(": no such kernel")


@pytest.mark.parametrize("published", EVERY_DTYPE)
def test_the_dtype_is_the_published_one_where_the_device_computes_in_it(published, machine, caplog):
    for capability in ((8, 0), (9, 0), (12, 0)):
        machine(cuda=1, capability=capability)
        assert choose_dtype(published, CUDA) == published
    assert choose_dtype(published, CPU) == published
    assert not caplog.records
    machine(cuda=1, capability=(7, 5))
    assert choose_dtype(published, CUDA) == (torch.float32 if published == torch.bfloat16 else published)
    said = "published in bfloat16, in which cuda:0 (card 0) does not compute: float32 is used"
    assert (said in caplog.text) == (published == torch.bfloat16)


@pytest.fixture
def arguments(monkeypatch):
    """What transformers is asked for; it then loads to the CPU."""
    asked, read = [], loading._read

    def record(loader, name, config, given):
        asked.append({"device": given.get("device_map", {}).get(""), "dtype": given["dtype"]})
        return read(loader, name, config, {key: each for key, each in given.items() if key != "device_map"})

    monkeypatch.setattr(loading, "_read", record)
    return asked


def test_auto_on_the_cpu_loads_what_none_loads(machine, arguments, tmp_path):
    tiny("lladamoe", torch.bfloat16).save_pretrained(tmp_path)
    one, other = load_model(tmp_path), load_model(tmp_path, device="auto")
    assert arguments == [{"device": None, "dtype": "auto"}] * 2
    assert one.dtype == other.dtype == torch.bfloat16
    ids = random_ids(2, 8)
    assert one(ids).logits.equal(other(ids).logits)


@pytest.mark.parametrize(
    ("there", "dtype", "device", "asked"),
    [
        ({"cuda": 1}, "auto", "auto", (CUDA, "auto")),
        ({"cuda": 1}, "float16", "auto", (CUDA, torch.float16)),
        ({"cuda": 2, "LOCAL_RANK": "1"}, "auto", "auto", (torch.device("cuda:1"), "auto")),
        ({"cuda": 1, "capability": (7, 0)}, "auto", "auto", (CUDA, torch.float32)),
        ({"cuda": 1, "capability": (7, 0)}, "bfloat16", "auto", (CUDA, torch.bfloat16)),
        ({"cuda": 1, "capability": (7, 0)}, "auto", "cpu", (CPU, "auto")),
        ({"cuda": 1, "capability": (7, 0)}, "auto", None, (None, "auto")),
        ({"mps": True}, "auto", "auto", (None, "auto")),
    ],
)
def test_a_model_is_loaded_as_the_rule_says(there, dtype, device, asked, machine, arguments, tmp_path):
    machine(**there)
    tiny("llada", torch.bfloat16).save_pretrained(tmp_path)
    load_model(tmp_path, dtype=dtype, device=device)
    assert arguments == [dict(zip(("device", "dtype"), asked, strict=True))]


def test_a_named_device_that_is_not_there_is_an_error_whatever_auto_finds(machine, tmp_path):
    machine(cuda=1)
    with pytest.raises(MachineError, match="Name auto or cpu"):
        load_model(tmp_path, device="cuda:0")
    with pytest.raises(ConfigError, match=r"'gpu' is no device. Possible: auto, cpu, cuda"):
        load_model(tmp_path, device="gpu")


@pytest.mark.parametrize("size", [None, "20KB"])
@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_the_published_dtype_is_the_configurations_else_that_of_the_weights(dtype, size, tmp_path):
    kept = {} if size is None else {"max_shard_size": size}
    tiny("llada", dtype).save_pretrained(tmp_path, **kept)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size is not None)
    name = str(tmp_path)
    assert published_dtype(name, resolve_config(name)[1]) == dtype
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("dtype", None) or fields.pop("torch_dtype")
    path.write_text(json.dumps(fields))
    config = resolve_config(name)[1]
    assert config.dtype is None
    assert published_dtype(name, config) == dtype == load_model(name).dtype
    assert loading.dtype_on(name, "auto", CPU) == dtype
    assert loading.base_dtype(name) == devices.name_of(dtype)
    for weights in tmp_path.glob("*.safetensors"):
        weights.write_bytes(b"x")
    assert published_dtype(name, config) is None, "reading them says what is wrong"
    assert loading.dtype_on(name, "auto", CPU) == "auto"


def test_training_asks_for_the_dtype_before_the_weights_reach_the_card(machine, tmp_path):
    tiny("llada", torch.bfloat16).save_pretrained(tmp_path / "base")
    adapted = add_outer_lora(load_model(tmp_path / "base"), LoRAOptions(r=2), seed=0, base=str(tmp_path / "base"))
    save_outer_adapter(adapted, tmp_path / "adapter")
    for name in ("base", "adapter"):
        machine(cuda=1, capability=(8, 6))
        assert loading.dtype_on(tmp_path / name, "auto", CUDA) == torch.bfloat16
        machine(cuda=1, capability=(7, 5))
        assert loading.dtype_on(tmp_path / name, "auto", CUDA) == torch.float32
        assert loading.dtype_on(tmp_path / name, "float16", CUDA) == torch.float16


def test_the_line_names_card_dtype_and_attention(machine):
    machine(cuda=2)
    line = "device cuda:0 (card 0), weights in bfloat16, attention sdpa"
    assert job_line(CUDA, torch.bfloat16, "sdpa") == line
    said = job_line(torch.device("cuda:1"), torch.float32, "eager", is_quantised=True, autocast=torch.float16)
    assert said == (
        "device cuda:1 (card 1), weights in 4 bits (nf4), the others in float32, products in float16 (autocast), "
        "attention eager"
    )
    assert job_line(CPU, "auto", None) == "device cpu, weights in the dtype of their files, attention its own"


def test_messages_go_through_the_log(machine, caplog):
    machine(mps=True)
    choose_device("auto")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
