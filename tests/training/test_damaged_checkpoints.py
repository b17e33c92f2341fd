"""A checkpoint that lacks something, or is damaged, is refused before anything is trained, in words."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import memdlm.workflows.runs.train as workflow
from chat_folder import make_chat, make_model
from memdlm.cli.main import main
from memdlm.errors import CheckpointError, ConfigError
from memdlm.models.hub.loading import MEMORY_CONFIG_FILE, MEMORY_FILE
from memdlm.training import MemDLMTrainer
from memdlm.training.states import check_checkpoint, left_out
from run_kinds import MEMORY, is_same, new_model, state, trainer_of

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    trainer = trainer_of(new_model(folder, "lladamoe", "full"), folder / "run", "learned", max_steps=2)
    trainer.train()
    return folder


@pytest.fixture
def checkpoint(bases, tmp_path):
    return Path(shutil.copytree(bases / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-1"))


def resume(bases, checkpoint, **options):
    def untrained(*_, **__):
        raise AssertionError("a step was taken")

    trainer = trainer_of(new_model(bases, "lladamoe", "full"), checkpoint.parent / "again", "learned", max_steps=2)
    trainer.training_step = untrained
    trainer.train(resume_from_checkpoint=str(checkpoint), **options)


@pytest.mark.parametrize("name", [*STATES, MEMORY_FILE, MEMORY_CONFIG_FILE, "trainer_state.json", "model.safetensors"])
def test_a_missing_file_is_named(name, bases, checkpoint):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name.partition(".")[0]):
        resume(bases, checkpoint)


@pytest.mark.parametrize("name", [*STATES, MEMORY_FILE, MEMORY_CONFIG_FILE, "trainer_state.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "half", "foreign", "a number"])
def test_a_damaged_file_is_named(damage, name, bases, checkpoint):
    file = checkpoint / name
    content = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "half": content[: len(content) // 2], "foreign": b"PK\x03\x04 no", "a number": b"7"}[damage]
    )
    with pytest.raises(CheckpointError, match=name.partition(".")[0]) as caught:
        resume(bases, checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", STATES)
def test_one_bit_of_a_state_is_noticed(name, bases, checkpoint):
    content = bytearray((checkpoint / name).read_bytes())
    # Every record begins with a header; behind its name come its bytes.
    content[content.index(b"data.pkl") + 200] ^= 4
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        resume(bases, checkpoint)


class Trap:
    def __reduce__(self):
        return (sys.exit, ("code of the file was run",))


@pytest.mark.parametrize("name", STATES)
def test_nothing_in_a_file_is_run(name, bases, checkpoint):
    torch.save({"state": Trap(), "param_groups": []}, checkpoint / name)
    with pytest.raises(CheckpointError, match=name):
        resume(bases, checkpoint)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimizer.pt", lambda found: found["param_groups"].pop()),
        ("optimizer.pt", lambda found: found["state"][0].update(exp_avg=torch.zeros(3))),
        ("optimizer.pt", lambda found: found.pop("state")),
        ("rng_state.pth", lambda found: found.update(cpu=torch.zeros(3, dtype=torch.uint8))),
        ("rng_state.pth", lambda found: found.pop("numpy")),
    ],
)
def test_a_state_of_another_shape_is_refused(name, change, bases, checkpoint):
    found = torch.load(checkpoint / name, weights_only=False)
    change(found)
    torch.save(found, checkpoint / name)
    with pytest.raises(CheckpointError, match=name):
        resume(bases, checkpoint)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("global_step", value) for value in (10**12, -1, 2, 1.0, True, None, "1")),
        *(("epoch", value) for value in (float("nan"), float("inf"), -0.5, 1e18, "x", None)),
        *(("max_steps", value) for value in (-1, float("inf"), 0.5, [])),
        ("best_metric", float("nan")),
        ("best_model_checkpoint", 3),
        ("train_batch_size", 1.5),
        ("log_history", {}),
        ("log_history", None),
        ("log_history", [1]),
        ("stateful_callbacks", []),
        ("total_flos", "many"),
        ("num_input_tokens_seen", float("inf")),
        ("unknown", 1),
    ],
    ids=str,
)
def test_a_position_that_cannot_be_is_refused(field, value, bases, checkpoint):
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"trainer_state.json is damaged: {field} "):
        resume(bases, checkpoint)


@pytest.mark.parametrize("text", ["[" * 10**5, "null", '{"epoch": 1e999}', '{"global_step": 1' + "0" * 5000 + "}"])
def test_json_that_is_no_state_is_refused(text, bases, checkpoint):
    (checkpoint / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trainer_state.json is damaged"):
        resume(bases, checkpoint)


def test_an_epoch_of_other_data_does_not_choose_the_noise(bases, checkpoint):
    """It is told by the steps: a state that says otherwise would silently change the run."""
    whole, again = (
        trainer_of(new_model(bases, "lladamoe", "full"), checkpoint.parent / name, "learned", max_steps=2)
        for name in ("whole", "again")
    )
    whole.train()
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"epoch": 1.0}))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert is_same(state(again), state(whole))


def test_a_best_checkpoint_that_is_gone_is_an_error_where_it_is_wanted(bases, checkpoint):
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best_model_checkpoint": "runs/x/checkpoint-77"}))
    arguments = trainer_of(new_model(bases, "lladamoe", "full"), checkpoint.parent, "learned").args
    check_checkpoint(checkpoint, arguments)
    arguments.load_best_model_at_end = True
    with pytest.raises(CheckpointError, match="checkpoint-77 as the best checkpoint so far, but it is missing"):
        check_checkpoint(checkpoint, arguments)


@pytest.mark.parametrize(
    ("files", "ranks", "fits"),
    [
        (["rng_state.pth"], 1, True),
        (["rng_state_0.pth", "rng_state_1.pth"], 2, True),
        (["rng_state_0.pth", "rng_state_1.pth"], 1, True),
        (["rng_state.pth"], 2, True),
        (["rng_state_0.pth"], 2, False),
        (["rng_state_1.pth", "rng_state_2.pth"], 1, False),
        ([], 1, False),
        ([], 2, False),
    ],
)
def test_the_random_states_of_all_ranks_are_needed(files, ranks, fits, bases, checkpoint, monkeypatch):
    arguments = trainer_of(new_model(bases, "lladamoe", "full"), checkpoint.parent, "learned").args
    content = (checkpoint / "rng_state.pth").read_bytes()
    (checkpoint / "rng_state.pth").unlink()
    for name in files:
        (checkpoint / name).write_bytes(content)
    monkeypatch.setattr(type(arguments), "world_size", ranks)
    monkeypatch.setattr(type(arguments), "process_index", ranks - 1)
    if fits:
        check_checkpoint(checkpoint, arguments)
    else:
        with pytest.raises(CheckpointError, match="lacks rng_state"):
            check_checkpoint(checkpoint, arguments)


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "rng", "memory"])
@pytest.mark.parametrize("damage", ["gone", "damaged", "whole"])
def test_a_run_goes_on_without_a_state_that_is_named(part, damage, bases, checkpoint):
    files = {"rng": ["rng_state.pth"], "memory": [MEMORY_FILE, MEMORY_CONFIG_FILE]}.get(part, [f"{part}.pt"])
    for file in files:
        (checkpoint / file).unlink() if damage == "gone" else None
        (checkpoint / file).write_text("?") if damage == "damaged" else None
    trainer = trainer_of(new_model(bases, "lladamoe", "full"), checkpoint.parent / "again", "learned", max_steps=2)
    fresh, seen, step = state(trainer), [], trainer.training_step
    trainer.training_step = lambda *args: seen.append(state(trainer)) or step(*args)
    trainer.train(resume_from_checkpoint=str(checkpoint), resume_without=[part])
    assert trainer.state.global_step == 2
    # What began anew shows: the second update of an optimizer or a schedule that has seen one.
    if part == "optimizer":
        assert {int(each["step"]) for each in trainer.optimizer.state.values()} == {1}
    if part == "scheduler":
        assert trainer.lr_scheduler.last_epoch == 1
    if part == "memory":
        learned = [name for name in fresh if name.startswith("memory.")]
        assert all(seen[0][name].equal(fresh[name]) for name in learned)
    assert not is_same(seen[0], fresh), "the weights are the checkpoint's all the same"


PARTS = {"start": "mem_learn_start", "rates": "mem_learn_lr", "gate": "mem_write_gate"}


@pytest.mark.parametrize("part", list(PARTS))
def test_each_learned_part_alone_is_a_state_that_a_run_goes_on_from(part, tmp_path):
    off = {"mem_learn_start": False, "mem_learn_lr": False, "mem_learned_rates_lr": 0.03, "mem_write_gate": "none"}
    options = off | {PARTS[part]: "learned" if part == "gate" else True, "max_steps": 2}

    def run(folder, **more):
        trainer = trainer_of(new_model(tmp_path, "llada", "full"), tmp_path / folder, "learned", **options)
        before = state(trainer)
        assert left_out("memory", trainer.args) == {"memory"}, "it can be begun anew"
        trainer.train(**more)
        return before, state(trainer)

    before, whole = run("whole")
    learned = [name for name in whole if name.startswith("memory.")]
    assert learned
    assert not all(before[name].equal(whole[name]) for name in learned), "a run that resumes must have lost something"
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    assert is_same(run("again", resume_from_checkpoint=str(checkpoint))[1], whole)
    (checkpoint / MEMORY_FILE).unlink()
    with pytest.raises(CheckpointError, match=MEMORY_FILE.partition(".")[0]):
        run("refused", resume_from_checkpoint=str(checkpoint))


def test_what_resume_without_cannot_do_is_refused(bases, checkpoint):
    arguments = trainer_of(new_model(bases, "lladamoe", "full"), checkpoint.parent).args
    assert left_out(None, arguments) == frozenset()
    assert left_out(" rng,optimizer ", arguments) == {"rng", "optimizer"}
    with pytest.raises(ConfigError, match=r"resume_without: 'optimiser' is not known.* Did you mean 'optimizer'"):
        left_out("optimiser", arguments)
    for part in ("scaler", "memory"):
        with pytest.raises(ConfigError, match=f"resume_without='{part}' has no effect"):
            left_out(part, arguments)
    with pytest.raises(ConfigError, match="has no effect without a checkpoint"):
        trainer_of(new_model(bases, "lladamoe", "full"), checkpoint.parent).train(resume_without=["rng"])


def flags(folder, **more):
    options = {
        **{"model": folder / "model", "dataset_args": folder / "chat.jsonl", "output_dir": folder / "run"},
        **{"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1},
        **{"report_to": "none", "disable_tqdm": True, "logging_steps": 1, **more},
    }
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_the_command_says_so_before_weights_are_loaded(tmp_path, capsys, monkeypatch):
    make_model(tmp_path / "model", "llada")
    make_chat(tmp_path / "chat.jsonl", 12)
    assert main(flags(tmp_path)) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    kept = {path: path.read_bytes() for path in checkpoint.iterdir()}

    def said(**more):
        capsys.readouterr()
        assert main(flags(tmp_path, **more)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "load_model", None)
        for name in ("scheduler.pt", "trainer_state.json", "optimizer.pt"):
            (checkpoint / name).write_bytes(kept[checkpoint / name][:100])
            assert name in said(resume="latest")
            (checkpoint / name).write_bytes(kept[checkpoint / name])
        (checkpoint / "rng_state.pth").unlink()
        last = said(resume="latest")
        assert "lacks rng_state.pth" in last
        assert "--resume_without rng" in last
        assert "has no effect" in said(resume_without="rng", overwrite_output_dir=True)
        assert "Did you mean 'rng'" in said(resume="latest", resume_without="rngs")
        run_file = (tmp_path / "run" / "run.json").read_text()
        (tmp_path / "run" / "run.json").write_text('{"options": {}, "world_size": 1}')
        assert "run.json cannot be read" in said(resume="latest", resume_without="rng")
        (tmp_path / "run" / "run.json").write_text(run_file)
        (tmp_path / "chat.jsonl").write_text("{")
        assert "no JSON" in said(overwrite_output_dir=True)
    assert checkpoint.is_dir(), "nothing is deleted for a run that cannot begin"


def test_a_run_that_is_told_goes_on_without(tmp_path):
    make_model(tmp_path / "model", "llada")
    make_chat(tmp_path / "chat.jsonl", 12)
    assert main(flags(tmp_path)) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-1" / "scheduler.pt").unlink()
    assert main(flags(tmp_path, resume="latest", resume_without="scheduler")) == 0
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"]["resume_without"] == "scheduler"


def test_all_checkpoints_that_are_written_pass(bases, tmp_path):
    for memory in MEMORY:
        trainer = trainer_of(new_model(bases, "small", "full"), tmp_path / memory, memory, max_steps=1)
        trainer.train()
        check_checkpoint(tmp_path / memory / "checkpoint-1", trainer.args)
    assert isinstance(trainer, MemDLMTrainer)
