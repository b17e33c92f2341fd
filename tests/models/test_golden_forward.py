"""The networks reproduce the published logits, hidden states and routing, and their names on disk."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from goldens import ROOT, cannot_replay, folders, model, must_know, read_json, tensors
from memdlm.models import BlockCausal, Full, load_model

pytestmark = pytest.mark.golden
FAMILIES = folders("forward.safetensors")
LOGITS = {"rtol": 0, "atol": 2e-4}
STATES = {"rtol": 1e-5, "atol": 2e-5}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_under_every_recorded_mask(family, attention):
    model(family)  # fails in words where the network is none of ours
    network = load_model(ROOT / family / "checkpoint", dtype="float32", attn_implementation=attention)
    names = recorded_forms(family, "logits")
    with torch.no_grad():
        for name in names:
            call = call_of(family, form_of(name))
            logits = network(**call).logits
            rows = facts(family).get("rows", {}).get(name, range(len(logits)))
            is_kept = call["attention_mask"].bool() if "attention_mask" in call else torch.ones(logits.shape[:2]).bool()
            for recorded, row in zip(tensors(family, "forward.safetensors")[name], rows, strict=True):
                assert_close(logits[row][is_kept[row]], recorded[is_kept[row]], **LOGITS)
    assert names or recorded_forms(family, "hidden_states")


def facts(family):
    """What is recorded beside the tensors: measures of the published code, and how some of them were made."""
    return read_json(family, "forward.json") if family in folders("forward.json") else {}


def recorded_forms(family, what):
    """The recorded tensors that begin with `what`. Every name must be one of these, or the input of another."""
    recorded = tensors(family, "forward.safetensors")
    others = [name for name in recorded if not name.startswith(("logits_", "hidden_states", "route/"))]
    must_know(family, others, LEFT_PADDED.values(), "tensors")
    return [name for name in recorded if name.startswith(what)]


def form_of(name):
    """The form of the mask in a tensor's name; the first hidden states go with the form that shows everything."""
    return name.removeprefix("logits_").removeprefix("hidden_states").removeprefix("_") or "nomask"


LEFT_PADDED = {
    "input_ids": "leftpad_input_ids",
    "attention_mask": "leftpad_attention_mask",
    "position_ids": "leftpad_position_ids",
}


def call_of(family, form):
    """The arguments of a network under a recorded form of the mask."""
    inputs = tensors(family, "inputs.safetensors")
    ids = inputs["mem_noised_input_ids"]
    if form == "nomask":
        return {"input_ids": ids}
    if form == "padmask":
        return {"input_ids": ids, "attention_mask": inputs["attention_mask_2d"]}
    if form == "full4d":
        return {"input_ids": ids, "attention_pattern": Full()}
    if form == "leftpad":
        recorded = tensors(family, "forward.safetensors")
        return {argument: recorded[name] for argument, name in LEFT_PADDED.items()}
    if form.startswith("block4d"):
        stated = facts(family).get(form, {}).get("block_size") or facts(family).get("block_size", 16)
        block = int(form.removeprefix("block4d_bs")) if "_bs" in form else stated
        return {"input_ids": ids, "attention_pattern": BlockCausal(block)}
    cannot_replay(family, f"this replay knows no mask of the form {form!r}")
    return {}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_every_layer(family):
    for name in recorded_forms(family, "hidden_states"):
        form = form_of(name)
        row = facts(family).get(form, {}).get("hidden_row", facts(family).get("hidden_row", 0))
        call = call_of(family, form)
        call = {key: value[row : row + 1] if isinstance(value, torch.Tensor) else value for key, value in call.items()}
        is_kept = call["attention_mask"][0].bool() if "attention_mask" in call else slice(None)
        with torch.no_grad():
            states = model(family)(**call, output_hidden_states=True).hidden_states
        recorded = tensors(family, "forward.safetensors")[name]
        assert_close(torch.stack(states)[:, 0, is_kept], recorded[:, 0, is_kept], **STATES)


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
