"""A memory for other programs: plain PEFT on the published networks, and merged checkpoints, in processes of their own.

`tests/stock_networks.py` computes them without memdlm; its logits are first held to those recorded of published code.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import stock_networks
from memdlm import ParametricMemory, load_model, load_tokenizer
from memdlm.cli.main import main
from memdlm.memory import read_memory
from memdlm.models import LoRAOptions, add_outer_lora, save_outer_adapter
from trees import tree

GOLDEN = Path(__file__).parents[1] / "golden"
STATES = "hidden_states"
"""Recorded without a mask; the logits follow from the last of them."""
FAMILIES = {
    "llada": "logits_nomask",
    "lladamoe": "logits_nomask",
    "llada21": "logits_full4d",
    "dream": STATES,
    "sdar": STATES,
}
KINDS = {
    "lora": ["--mem_inner_rank", "4"],
    "full": [
        "--mem_inner_adapter_type",
        "full",
        "--mem_inner_target_modules",
        "up_proj,down_proj",
    ],
    "compressed": ["--mem_inner_rank", "4", "--compress_rank", "2"],
}
CLOSE = {"rtol": 0, "atol": 5e-4}


def checkpoint(family):
    return str(GOLDEN / family / "checkpoint")


def ids_of(family):
    return load_file(GOLDEN / family / "inputs.safetensors")["mem_noised_input_ids"]


def elsewhere(ids, out, *jobs):
    """Logits of a process that knows torch, safetensors and PEFT alone; a job is CHECKPOINT or CHECKPOINT:ADAPTER."""
    torch.save(ids, out.with_suffix(".ids"))
    words = [stock_networks.__file__, str(out.with_suffix(".ids")), str(out), *map(str, jobs)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env={"PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out)


@torch.no_grad()
def recalled(model, memory, ids):
    network, saved = load_model(model), read_memory(memory)
    mask = load_tokenizer(model).mask_token_id
    with ParametricMemory(network, saved.reading_config, mask_token_id=mask).recall(saved):
        return network(ids).logits


def memorize(model, folder, *more):
    (folder / "doc.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 3)
    words = ["--model", model, "--file", str(folder / "doc.txt"), "--output", str(folder / "doc.mem")]
    assert main(["memorize", *words, "--mem_inner_lr", "0.5", "--mem_inner_layer_fraction", "0.5", *more]) == 0
    return str(folder / "doc.mem")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_networks_are_the_published_ones(family):
    recorded = load_file(GOLDEN / family / "forward.safetensors")[FAMILIES[family]]
    with torch.no_grad():
        network = stock_networks.network(checkpoint(family))
        logits = network(ids_of(family))
        if FAMILIES[family] == STATES:
            recorded = network.lm_head(recorded[-1])
        # Of the two rows only the first is recorded here.
        assert_close(logits[: len(recorded)], recorded, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llada21", "lora"),
        *(pytest.param(family, "lora", marks=pytest.mark.slow) for family in FAMILIES if family != "llada21"),
        *(pytest.param("lladamoe", kind, marks=pytest.mark.slow) for kind in ("full", "compressed")),
    ],
)
def test_peft_and_a_merged_checkpoint_compute_what_the_memory_does(family, kind, tmp_path, capsys):
    model, ids = checkpoint(family), ids_of(family)
    memory = memorize(model, tmp_path, *KINDS[kind])
    expected = recalled(model, memory, ids)
    before = tree(tmp_path / "doc.mem")
    assert main(["memory", "export", memory, "--output", str(tmp_path / "adapter")]) == 0
    assert "linear layers, for PEFT" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", ".memdlm.json")
    }
    assert main(["memory", "export", memory, "--merged", "--output", str(tmp_path / "merged")]) == 0
    # A memory leaves out experts that add nothing; it is an adapter to `merge` all the same.
    assert main(["merge", "--adapter", memory, "--output", str(tmp_path / "by_merge"), "--dtype", "auto"]) == 0
    jobs = [model, f"{model}:{tmp_path / 'adapter'}", tmp_path / "merged", tmp_path / "by_merge"]
    bare, by_peft, merged, by_merge = elsewhere(ids, tmp_path / "logits.pt", *jobs)
    assert by_merge.equal(merged)
    assert (bare - expected).abs().max() > 100 * CLOSE["atol"], "the memory does something"
    assert_close(by_peft, expected, **CLOSE)
    assert_close(merged, expected, **CLOSE)
    with torch.no_grad():
        assert_close(load_model(tmp_path / "merged")(ids).logits, expected, **CLOSE)
    assert load_tokenizer(tmp_path / "merged").get_vocab() == load_tokenizer(model).get_vocab()
    assert tree(tmp_path / "doc.mem") == before


def test_an_outer_adapter_is_merged_first(tmp_path):
    model, ids = checkpoint("lladamoe"), ids_of("lladamoe")
    network = add_outer_lora(load_model(model), LoRAOptions(r=2), seed=0, base=model)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name or name.endswith("_b"):
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    save_outer_adapter(network, tmp_path / "outer")
    memory = memorize(model, tmp_path, "--adapter", str(tmp_path / "outer"), "--mem_inner_rank", "4")
    saved = read_memory(memory)
    network = load_model(model, adapter=str(tmp_path / "outer"))
    mask = load_tokenizer(model).mask_token_id
    with torch.no_grad(), ParametricMemory(network, saved.reading_config, mask_token_id=mask).recall(saved):
        expected = network(ids).logits
    merged = ["memory", "export", memory, "--merged", "--output", str(tmp_path / "merged")]
    assert main([*merged, "--model", model]) == 2, "the outer adapter is missing"
    assert not (tmp_path / "merged").exists()
    assert main([*merged, "--model", model, "--adapter", str(tmp_path / "outer")]) == 0
    (merged,) = elsewhere(ids, tmp_path / "logits.pt", tmp_path / "merged")
    assert_close(merged, expected, **CLOSE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "", "--merged"], "--output is missing"),
        (["--output", "out", "--dtype", "float32"], "dtype='float32' has no effect without merged"),
        (["--output", "out", "--adapter", "x"], "adapter='x' has no effect without merged"),
        (["--output", "out", "--merged", "--model", checkpoint("llada")], "it was written for another family"),
        (["--output", "mine"], "memdlm did not write"),
    ],
)
def test_an_export_refuses_in_one_line(more, message, tmp_path, capsys, monkeypatch):
    memory = memorize(checkpoint("lladamoe"), tmp_path, "--mem_inner_rank", "2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    capsys.readouterr()
    assert main(["memory", "export", memory, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_when_asked(tmp_path, capsys):
    memory = memorize(checkpoint("llada"), tmp_path, "--mem_inner_rank", "2")
    words = ["memory", "export", memory, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert main([*words, "--merged", "--overwrite"]) == 2, "an adapter is not replaced by a model"
