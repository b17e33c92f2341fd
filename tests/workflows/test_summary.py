"""What is said about a model without loading it is what the loaded one has."""

import json

import pytest

from memdlm.cli.main import main
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.sites import find_sites
from memdlm.models import DreamConfig, LLaDA2MoeConfig, LLaDAConfig, LLaDAMoEConfig, SDARConfig
from memdlm.workflows.summary import summarise
from tiny import CONFIGS, MASK, rng, tiny


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_counts_are_those_of_the_loaded_model(family, adapter, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    config = MemoryConfig(inner_layer_fraction=0.5, inner_adapter_type=adapter)
    summary = summarise(tmp_path, config)
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    memory.fast.reset(1, rng())
    assert summary.num_fast_parameters == sum(value.numel() for value in memory.fast.tensors())
    assert summary.num_parameters == sum(p.numel() for p in model.parameters())
    assert sum(len(group.layers) for group in summary.sites) == len(memory.fast.sites)
    has_experts = "experts per token" in summary.sizes
    assert (summary.num_active_parameters < summary.num_parameters) == has_experts


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        # Totals as counted on the published code; idle are 56 of 64 and 248 of 256 experts of 3 matrices each.
        (LLaDAMoEConfig(), 7_356_880_896, 7_356_880_896 - 16 * 56 * 3 * 2048 * 1024),
        (
            LLaDA2MoeConfig(num_key_value_heads=4, head_dim=128),
            16_255_638_528,
            16_255_638_528 - 19 * 248 * 3 * 2048 * 512,
        ),
        (LLaDAConfig(mlp_hidden_size=12288), 8_015_581_184, 8_015_581_184),
        # Half the bytes of SDAR-4B-Chat's bfloat16 file; Dream has the tensors of Qwen2.5-7B.
        (SDARConfig(), 4_411_424_256, 4_411_424_256),
        (DreamConfig(), 7_615_616_512, 7_615_616_512),
    ],
    ids=["LLaDA-MoE-7B-A1B", "LLaDA2.x-mini", "LLaDA-8B", "SDAR-4B", "Dream-7B"],
)
def test_released_sizes(config, total, active, tmp_path, capsys):
    config.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["num_parameters"] == total
    assert said["num_active_parameters"] == active


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("dream", ("Dream (DreamModel)", "everything", "the next position")),
        ("sdar", ("SDAR (SDARForCausalLM)", "blocks of 4 tokens and those before", "its own position")),
    ],
)
def test_the_tables_say_who_sees_whom_and_what_is_predicted(family, words, tmp_path, capsys):
    tiny(family).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--mem_inner_layer_fraction", "0.5"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)


def test_the_tables_name_family_blocks_and_sizes(tmp_path, capsys):
    tiny("llada2").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--mem_inner_rank", "4", "--mem_inner_layer_fraction", "0.4"]) == 0
    text = capsys.readouterr().out
    for word in (
        "LLaDA2",
        "float32",
        "mlp.experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "1, 2 ",
        "the 3 blocks",
        "in all 10,368, 0.0 MiB",
    ):
        assert word in text, text


def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    tiny("llada").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--mem_inner_target_modules", "query_key_value"]) == 2
    assert "They have: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "published", "ours"),
    [
        ("llada", "ff_proj,up_proj,ff_out", "gate_proj,up_proj,down_proj"),
        ("llada", "q_proj,attn_out", "q_proj,o_proj"),
        ("llada2", "query_key_value,dense", "query_key_value,o_proj"),
        ("lladamoe", "o_proj,gate_proj", "o_proj,gate_proj"),
    ],
)
def test_targets_may_have_their_published_names(family, published, ours):
    model = tiny(family)
    paths = [[site.path for site in find_sites(model, tuple(t.split(",")), 0.5)] for t in (published, ours)]
    assert paths[0] == paths[1]
    assert paths[0]
