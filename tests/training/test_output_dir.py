"""The folder of a training run: others' files are never deleted, and an exchange that was cut off is undone."""

import itertools
import json

import pytest
import torch
from torch.testing import assert_close

import run_kinds
from memdlm.errors import ConfigError, MachineError
from memdlm.models import LoRAOptions, add_outer_lora, load_model
from memdlm.training.checkpoints import checkpoints_in, move_files, prepare_output, publish, restore, rotate
from memdlm.training.output_dir import refuse_others
from run_kinds import new_model
from tiny import random_ids, rng, tiny
from trees import tree


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def checkpoint(path, text="1"):
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))
    (path / "optimizer.pt").write_text(text)
    return path


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        publish(checkpoint(folder / ".saving" / f"checkpoint-{step}"), folder / f"checkpoint-{step}")
    (folder / ".saving").rmdir()
    (folder / "run.json").write_text(json.dumps({"memdlm": "0", "options": {}, "command": []}))
    return folder


def test_overwriting_deletes_checkpoints_of_runs_and_nothing_else(run):
    prepare_output(run, "never", overwrite=True)
    assert [path.name for path in run.iterdir()] == ["run.json"]
    checkpoint(run / "checkpoint-1")  # of transformers or an earlier version: without a marker
    prepare_output(run, "never", overwrite=True)
    assert not checkpoints_in(run)


@pytest.mark.parametrize("name", ["checkpoint-2/notes.txt", "checkpoint-2/.git/HEAD", "thesis.tex", "checkpoint-7/a"])
def test_anything_else_is_refused(name, run):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    before = tree(run)
    with pytest.raises(ConfigError, match="which no training run of memdlm wrote"):
        prepare_output(run, "never", overwrite=True)
    assert tree(run) == before


@pytest.mark.parametrize("state", ["mine", "[]", "{}", None])
def test_a_checkpoint_of_nobodys_run_is_refused(state, run):
    (run / "checkpoint-3" / ".memdlm.json").unlink()
    (run / "checkpoint-3" / "trainer_state.json").unlink()
    if state is not None:
        (run / "checkpoint-3" / "trainer_state.json").write_text(state)
    with pytest.raises(ConfigError, match="checkpoint-3"):
        refuse_others(run, goes_on=True)


@pytest.mark.parametrize("text", ["mine", "{}", '{"options": {}}'])
def test_a_run_file_of_another_program_makes_no_folder_ours(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "model.safetensors").write_text("mine")
    for goes_on in (False, True):
        with pytest.raises(ConfigError, match="which no training run of memdlm wrote"):
            refuse_others(tmp_path, goes_on=goes_on)


def test_rotation_keeps_the_newest_the_best_and_others_files(run):
    (run / "checkpoint-2" / "notes.txt").write_text("mine")
    rotate(run, 2, str(run / "checkpoint-1"))
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [path.name for path in (run / "checkpoint-2").iterdir() if path.name != ".memdlm.json"] == ["notes.txt"]
    rotate(run, None, None)
    (run / "checkpoint-2" / "notes.txt").unlink()
    rotate(run, 1, None)
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-3"]


def test_a_checkpoint_takes_the_place_of_a_checkpoint_and_of_nothing_else(run):
    publish(checkpoint(run / ".saving" / "checkpoint-3", "2"), run / "checkpoint-3")
    assert (run / "checkpoint-3" / "optimizer.pt").read_text() == "2"
    assert not (run / ".checkpoint-3.old").exists()
    (run / "checkpoint-3" / "notes.txt").write_text("mine")
    new = checkpoint(run / ".saving" / "checkpoint-3", "3")
    with pytest.raises(ConfigError, match=f"The new checkpoint is in {new}"):
        publish(new, run / "checkpoint-3")
    assert (run / "checkpoint-3" / "notes.txt").read_text() == "mine"
    assert (new / "optimizer.pt").read_text() == "3"


def test_a_kill_between_the_renames_is_undone(run):
    (run / "checkpoint-2").rename(run / ".checkpoint-2.old")
    checkpoint(run / ".checkpoint-3.old")  # its successor is there
    assert prepare_output(run, str(run / "checkpoint-2"), overwrite=False) == run / "checkpoint-2"
    (run / ".checkpoint-9.old").mkdir()
    (run / ".checkpoint-9.old" / "mine").write_text("mine")
    restore(run)
    assert not (run / "checkpoint-9").exists()


def test_final_weights_replace_their_own_and_no_others(tmp_path):
    for number in (1, 2):
        source = tmp_path / ".saving-final"
        source.mkdir()
        for name in ("config.json", "model.safetensors"):
            (source / name).write_text(str(number))
        move_files(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "2"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("weights of somebody")
    source.mkdir()
    (source / "model.safetensors").write_text("3")
    with pytest.raises(ConfigError, match=f"The files to be saved are in {source}"):
        move_files(source, tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").read_text() == "weights of somebody"
    assert (source / "model.safetensors").read_text() == "3"


KINDS = [("full", "off"), ("full", "learned"), ("LoRA", "off"), ("LoRA", "learned"), ("QLoRA", "on")]


@pytest.mark.parametrize("has_marker", [True, slow(False)])
@pytest.mark.parametrize("family", ["small", slow("llada"), slow("lladamoe"), slow("llada2"), slow("sdar")])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)), ids=str)
def test_final_weights_are_those_of_the_last_run_alone(first, second, family, has_marker, tmp_path):
    """What a run of another kind left in the same folder would be loaded with, or in place of, the new weights."""
    out, ids = tmp_path / "out", random_ids(2, 9)
    for number, (trained, memory) in enumerate((first, second)):
        model = new_model(tmp_path, family, trained)
        trainer = run_kinds.trainer_of(model, out, memory)
        for parameter in (each for each in trainer.model.parameters() if each.requires_grad):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng(number), dtype=parameter.dtype)
        (out / "run.json").write_text(json.dumps({"memdlm": "0", "options": {}, "command": []}))
        trainer.save_final(out)
        if not has_marker:  # as earlier versions left it
            (out / ".memdlm.json").unlink()
        expected = trainer.model.eval()(input_ids=ids).logits
    loaded = load_model(out, load_in_4bit=second[0] == "QLoRA")
    assert_close(loaded(input_ids=ids).logits, expected)
    assert {path.name for path in out.glob("memory_init*")} == (
        {"memory_init.json", "memory_init.safetensors"} if second[1] == "learned" else set()
    )
    assert not list(out.glob("model*.safetensors" if second[0] != "full" else "adapter*"))


def test_what_cannot_be_deleted_is_an_error_and_the_new_weights_are_not_lost(tmp_path, monkeypatch):
    source = tmp_path / ".saving-final"
    for name in ("adapter_model.safetensors", "model.safetensors"):
        source.mkdir()
        (source / name).write_text(name)
        if name == "adapter_model.safetensors":
            move_files(source, tmp_path / "out")
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError("immutable")))
    with pytest.raises(MachineError, match=r"adapter_model\.safetensors is of an earlier run and could not be deleted"):
        move_files(source, tmp_path / "out")
    assert (source / "model.safetensors").read_text() == "model.safetensors"


def test_files_of_others_stay_beside_final_weights(tmp_path):
    for names in (("adapter_model.safetensors", "adapter_config.json"), ("model.safetensors", "config.json")):
        source = tmp_path / ".saving-final"
        source.mkdir()
        for name in names:
            (source / name).write_text("{}")
        move_files(source, tmp_path / "out")
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert set(tree(tmp_path / "out")) == {".memdlm.json", "config.json", "model.safetensors", "notes.txt"}


def test_an_adapter_is_saved_over_ours_and_not_over_anothers(tmp_path):
    model = add_outer_lora(tiny("small"), LoRAOptions(), seed=0)
    for _ in range(2):
        model.save_pretrained(tmp_path / "ours")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "adapter_model.safetensors").write_text("mine")
    for name in ("peft", "named"):
        before = tree(tmp_path / name)
        with pytest.raises(ConfigError, match="it replaces only what it made itself"):
            model.save_pretrained(tmp_path / name)
        assert tree(tmp_path / name) == before
