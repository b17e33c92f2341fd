"""The networks reproduce the published logits, hidden states and routing, and their names on disk."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from goldens import ROOT, folders, model, must_know, read_json, tensors
from memdlm.models import BlockCausal, load_model

pytestmark = pytest.mark.golden
FAMILIES = folders("forward.safetensors")
LOGITS = {"rtol": 0, "atol": 2e-4}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_under_every_recorded_mask(family, attention):
    model(family)  # fails in words where the network is none of ours
    network = load_model(ROOT / family / "checkpoint", dtype="float32", attn_implementation=attention)
    inputs, recorded = tensors(family, "inputs.safetensors"), tensors(family, "forward.safetensors")
    ids, keep = inputs["mem_noised_input_ids"], inputs["attention_mask_2d"]
    batch, length = ids.shape
    calls = {
        "logits_nomask": {},
        "logits_padmask": {"attention_mask": keep},
        "logits_full4d": {"attention_mask": torch.zeros(batch, 1, length, length)},
        "logits_block4d": {"attention_pattern": BlockCausal(facts(family).get("block_size", 16))},
    }
    seen = 0
    must_know(family, (name for name in recorded if name.startswith("logits")), calls, "logits")
    with torch.no_grad():
        for name, arguments in calls.items():
            if name not in recorded:
                continue
            logits, expected = network(ids, **arguments).logits, recorded[name]
            if name == "logits_padmask":
                logits, expected = logits[keep.bool()], expected[keep.bool()]
            assert_close(logits, expected, **LOGITS)
            seen += 1
    assert seen


def facts(family):
    """What is recorded beside the tensors: measures of the published code, and how some of them were made."""
    return read_json(family, "forward.json") if family in folders("forward.json") else {}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_every_layer(family):
    row = facts(family).get("hidden_row", 0)
    ids = tensors(family, "inputs.safetensors")["mem_noised_input_ids"][row : row + 1]
    recorded = tensors(family, "forward.safetensors")
    must_know(family, (name for name in recorded if name.startswith("hidden")), ["hidden_states"], "states")
    with torch.no_grad():
        states = model(family)(ids, output_hidden_states=True).hidden_states
    assert_close(torch.stack(states), recorded["hidden_states"], rtol=1e-5, atol=2e-5)


def routes(family):
    return {k: v for k, v in tensors(family, "forward.safetensors").items() if k.startswith("route/")}


@pytest.mark.parametrize("family", [family for family in FAMILIES if routes(family)])
def test_routing_of_every_layer(family):
    recorded = routes(family)
    found = {}

    def remember(index):
        return lambda module, arguments, out: found.__setitem__(index, arguments)

    network = model(family)
    handles = [
        layer.mlp.experts.register_forward_hook(remember(index))
        for index, layer in enumerate(network.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    with torch.no_grad():
        network(tensors(family, "inputs.safetensors")["mem_noised_input_ids"])
    for handle in handles:
        handle.remove()
    for index, (_, expert, weight) in found.items():
        assert expert.equal(recorded[f"route/{index}/idx"])
        assert_close(weight, recorded[f"route/{index}/weight"], rtol=1e-5, atol=1e-6)
    assert len(found) * 2 == len(recorded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_checkpoint_has_the_published_names_and_bits(family, tmp_path):
    model(family).save_pretrained(tmp_path)
    ours, published = (
        load_file(tmp_path / "model.safetensors"),
        load_file(ROOT / family / "checkpoint/model.safetensors"),
    )
    assert set(ours) == set(published)
    assert all(ours[name].equal(published[name]) for name in published)
    again = load_model(tmp_path, dtype="float32")
    for name, value in model(family).state_dict().items():
        assert again.state_dict()[name].equal(value)
