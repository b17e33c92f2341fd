"""A model is filled from what saving it wrote, every tensor of it, or nothing is changed and the list is given."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from memdlm.errors import CheckpointError
from memdlm.models import LoRAOptions, add_outer_lora
from memdlm.models.hub.loading import load_weights
from tiny import CONFIGS, rng, tiny
from tiny_foreign import FOREIGN

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KINDS = (*CONFIGS, *FOREIGN)


def make(kind, seed=0, dtype=torch.float32):
    if kind in CONFIGS:
        return tiny(kind, dtype, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FOREIGN[kind]().to(dtype).eval()


@torch.no_grad()
def trained(kind, dtype=torch.float32):
    """A model all of whose tensors, buffers too, are its own."""
    model = make(kind, 1, dtype)
    for tensor in model.state_dict().values():
        tensor.add_(torch.rand(tensor.shape, generator=rng(2)).to(tensor))
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_a_saved_model_comes_back_in_place(kind, dtype, tmp_path):
    saved, model = trained(kind, dtype), make(kind, dtype=dtype)
    saved.save_pretrained(tmp_path)
    before, places = state(model), {name: value.data_ptr() for name, value in model.named_parameters()}
    expected = state(saved)
    assert not is_same(before, expected)
    load_weights(model, tmp_path)
    assert is_same(state(model), expected)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places
    assert model.config.dtype == make(kind, dtype=dtype).config.dtype


@pytest.mark.parametrize("kind", ["lladamoe", "llada2"])
def test_dtypes_that_differ_within_a_model_are_kept_to_the_bit(kind, tmp_path):
    def mixed(model):
        model.to(torch.bfloat16).model.layers[1].float()
        return model

    saved, model = mixed(trained(kind)), mixed(make(kind))
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    assert is_same(state(model), state(saved))


@pytest.mark.parametrize("kind", ["llada", "lladamoe", "llada2", "bert"])
def test_files_in_several_pieces_and_wrapped_models_are_the_same_to_it(kind, tmp_path):
    saved, model = trained(kind), make(kind)
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file()
    load_weights(torch.compile(model), tmp_path)
    assert is_same(state(model), state(saved))
    next(tmp_path.glob("model-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of"):
        load_weights(model, tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match="could not be read"):
        load_weights(model, tmp_path)


def test_an_adapter_is_filled_by_the_same_call(tmp_path):
    model, other = (add_outer_lora(make("lladamoe"), LoRAOptions(r=2), seed=seed) for seed in (0, 1))
    other.save_pretrained(tmp_path)
    assert not is_same(state(model), state(other))
    load_weights(model, tmp_path)
    assert is_same(state(model), state(other))


def test_what_is_no_transformers_model_is_filled_as_strictly(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    model, other = (peft.get_peft_model(make("bert"), config) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    other.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    assert is_same(state(model), state(other))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != gone}, file)
    with pytest.raises(CheckpointError, match=f"missing: {gone}"):
        load_weights(model, tmp_path)
    layer = nn.Linear(3, 4)
    save_file({"weight": torch.ones(4, 3), "bias": torch.ones(5)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"of the wrong size: bias \(5,\) instead of \(4,\)"):
        load_weights(layer, tmp_path)


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def last(tensors):
    return max(name for name in tensors if "norm" in name.lower())


@pytest.mark.parametrize("kind", ["llada", "lladamoe", "llada2", "small", *FOREIGN])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(last(t)), "(?i)missing: .*norm"),
        (lambda t: t.update({"extra.weight": torch.ones(2)}), "unexpected: .*extra.weight"),
        (lambda t: t.update({last(t): torch.ones(3)}), r"(?i)of the wrong size: .*norm.* \(3,\) instead of \(32,\)"),
        (lambda t: [t.pop(name) for name in list(t)[1:]], "missing: "),
    ],
    ids=["missing", "unexpected", "another size", "nearly all missing"],
)
def test_a_file_that_does_not_match_changes_nothing(change, message, kind, tmp_path):
    trained(kind).save_pretrained(tmp_path)
    edit(tmp_path, change)
    model = make(kind)
    before = state(model)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path)
    assert is_same(state(model), before)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
def test_a_truncated_file_changes_nothing(kept, tmp_path):
    trained("lladamoe").save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    model = make("lladamoe")
    before = state(model)
    with pytest.raises(CheckpointError, match="could not be read"):
        load_weights(model, tmp_path)
    assert is_same(state(model), before)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_weights(make("small"), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        load_weights(make("small"), tmp_path / "empty")
    (tmp_path / "empty" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match="empty"):
        load_weights(make("small"), tmp_path / "empty")
