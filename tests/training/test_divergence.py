"""A run that diverges stops with status 1, says where, and leaves nothing unsound behind."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from chat_folder import make_chat, make_model
from memdlm.cli.main import main
from memdlm.errors import ConfigError, DivergedError, NotFiniteError
from memdlm.training import TrainingArguments
from memdlm.training.finite import FiniteWatch, largest
from memdlm.training.guarding import SKIPPED
from memdlm.training.objective import OuterObjective
from run_kinds import MEMORY, new_model, trainer_of


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def all_tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from all_tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from all_tensors(each)


def assert_sound(folder):
    """Nothing in `folder` holds NaN, and there is no infinite tensor."""
    for path in Path(folder).rglob("*"):
        if path.suffix == ".safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
        elif path.name == "optimizer.pt":
            assert all(tensor.isfinite().all() for tensor in all_tensors(torch.load(path))), path
        elif path.suffix == ".json":
            assert "NaN" not in path.read_text(), path
    assert not list(Path(folder).glob(".saving*"))


class At(TrainerCallback):
    """Does something to the trainer at one event of one step."""

    def __init__(self, event, step, do):
        setattr(self, event, lambda args, state, control, **kwargs: do(**kwargs) if state.global_step == step else None)


def grow(model=None, **_):
    """Make the output's weights so large that they are finite and the logits are not."""
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("family", "trained"), [("llada", "full"), ("lladamoe", "LoRA"), ("llada2", "QLoRA")])
def test_a_learning_rate_that_is_too_large_stops_the_run(family, trained, memory, clip, bases, tmp_path):
    if trained == "QLoRA":
        pytest.importorskip("bitsandbytes")
    trainer = trainer_of(
        new_model(bases, family, trained), tmp_path, memory, learning_rate=1e30, max_grad_norm=clip, max_steps=6
    )
    with pytest.raises(DivergedError, match=r"at step [23] held NaN or infinity") as caught:
        trainer.train()
    assert str(tmp_path / "checkpoint-1") in str(caught.value)
    assert "learning_rate (now 1e+30)" in str(caught.value)
    assert caught.value.exit_status == 1
    assert (tmp_path / "checkpoint-1").is_dir()
    assert_sound(tmp_path)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_memory_whose_start_diverges_stops_the_run(clip, bases, tmp_path):
    rates = {"mem_learned_start_lr": 1e6, "mem_learned_rates_lr": 1e6, "max_grad_norm": clip, "max_steps": 5}
    trainer = trainer_of(new_model(bases, "small", "full"), tmp_path, "learned", **rates)
    with pytest.raises(DivergedError, match="training diverged"):
        trainer.train()
    assert_sound(tmp_path)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_step_and_what_it_was_are_named(accumulation, bases, tmp_path):
    """Nothing is logged or saved on the way: the step before the last would be blamed otherwise."""
    trainer = trainer_of(
        new_model(bases, "llada", "full"),
        tmp_path,
        max_steps=30,
        save_steps=2,
        logging_steps=30,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    trainer.add_callback(At("on_step_begin", 2, grow))
    with pytest.raises(DivergedError, match=r"the loss at step 3 held .*/checkpoint-2\."):
        trainer.train()
    assert trainer.state.global_step == 3, "it stopped before the next step"
    assert_sound(tmp_path)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_is_noticed_where_the_loss_is_finite(clip, bases, tmp_path):
    model = new_model(bases, "llada", "full")
    trainer = trainer_of(model, tmp_path, max_grad_norm=clip, save_steps=3, logging_steps=3)

    def spoil(**_):
        model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)

    trainer.add_callback(At("on_step_begin", 0, spoil))
    with pytest.raises(DivergedError, match=r"the gradient's norm at step 1 .* no checkpoint had been saved before"):
        trainer.train()
    assert_sound(tmp_path)


@pytest.mark.parametrize("memory", ["off", "learned"])
@pytest.mark.parametrize("what", ["the weights", "the optimizer's state", "the memory's learned start or rates"])
def test_what_is_saved_is_looked_at_itself(what, memory, bases, tmp_path):
    model = new_model(bases, "lladamoe", "full")
    trainer = trainer_of(model, tmp_path, memory, max_steps=3)
    if what.startswith("the memory") and memory == "off":
        pytest.skip("there is none")

    def spoil(**_):
        held = {
            "the weights": lambda: model.lm_head.weight.data,
            "the optimizer's state": lambda: trainer.optimizer.state[model.lm_head.weight]["exp_avg_sq"],
            "the memory's learned start or rates": lambda: trainer.memory.learned.log_rates.data,
        }
        held[what]().view(-1)[-1] = math.inf

    trainer.add_callback(At("on_step_end", 2, spoil))
    with pytest.raises(DivergedError, match=rf"{what} at step 2 held .*/checkpoint-1"):
        trainer.train()
    assert_sound(tmp_path)
    assert not (tmp_path / "checkpoint-2").exists()


def test_the_end_is_looked_at_too(bases, tmp_path):
    model = new_model(bases, "llada", "full")
    trainer = trainer_of(model, tmp_path, save_strategy="no", logging_strategy="no")

    def spoil(**_):
        model.lm_head.weight.data[0, 0] = math.nan

    trainer.add_callback(At("on_step_end", 3, spoil))
    with pytest.raises(DivergedError, match="the weights at step 3"):
        trainer.train()


def test_nothing_unsound_is_saved_by_hand(bases, tmp_path):
    model = new_model(bases, "llada", "full")
    trainer = trainer_of(model, tmp_path)
    model.lm_head.weight.data[0, 0] = math.nan
    for save in (trainer.save_model, lambda: trainer.save_final(tmp_path / "final")):
        with pytest.raises(NotFiniteError, match="the weights held NaN"):
            save()
    assert not list(tmp_path.rglob("*.safetensors"))


class Score(TrainerCallback):
    """Gives NaN for a figure of its own at step 2."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = {1: 1.0, 2: math.nan}.get(state.global_step, 0.0)


@pytest.mark.parametrize("greater", [True, False])
def test_a_figure_that_is_no_number_is_never_the_best(greater, bases, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "score", "greater_is_better": greater}
    trainer = trainer_of(new_model(bases, "llada", "full"), tmp_path, load_best_model_at_end=True, **more)
    trainer.add_callback(Score())
    with pytest.raises(DivergedError, match=r"the evaluation's score at step 2 .*/checkpoint-1"):
        trainer.train()


@pytest.mark.parametrize("memory", ["off", "on"])
def test_an_evaluation_that_is_not_finite_is_an_error(memory, bases, tmp_path):
    model = new_model(bases, "llada", "full")
    trainer = trainer_of(model, tmp_path, memory, eval_strategy="steps", eval_steps=1)
    grow(model)
    # With memory its write is the first to see it.
    match = "the evaluation's eval_" if memory == "off" else "not finite after the write"
    with pytest.raises(NotFiniteError, match=match):
        trainer.evaluate()
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_a_bound_with_memory_that_is_not_finite_is_not_left_out(bases, tmp_path, monkeypatch):
    trainer = trainer_of(new_model(bases, "llada", "full"), tmp_path, "on")
    assert math.isfinite(trainer.evaluate()["eval_nll_memory"])
    real = OuterObjective.score

    def score(self, model, batch, lower_layers=None, *args, **kwargs):
        lost = real(self, model, batch, lower_layers, *args, **kwargs)
        return lost if lower_layers is None else SimpleNamespace(bound=lost.bound * math.nan)

    monkeypatch.setattr(OuterObjective, "score", score)
    with pytest.raises(NotFiniteError, match="the evaluation's eval_nll_memory"):
        trainer.evaluate()


def test_steps_that_fp16_leaves_out_are_no_error_unless_all_are(bases, tmp_path):
    trainer = trainer_of(new_model(bases, "llada", "full"), tmp_path)
    trainer.is_in_train, trainer.accelerator.scaler = True, object()
    trainer._note_gradient(torch.tensor(math.inf), 1)
    assert not trainer._watch.flag()
    skipped = SimpleNamespace(optimizer_step_was_skipped=False)
    real, trainer.accelerator = trainer.accelerator, skipped
    for step in range(1, 3 * SKIPPED):
        trainer.state.global_step, skipped.optimizer_step_was_skipped = step, step % SKIPPED != 0
        trainer._count_skipped()
    trainer.accelerator = real
    trainer.accelerator.scaler = None
    trainer._note_gradient(torch.tensor(math.inf), 1)
    assert trainer._watch.flag()
    trainer.accelerator = skipped
    skipped.optimizer_step_was_skipped = True
    trainer.state.global_step = 3 * SKIPPED - 1
    trainer._count_skipped()
    trainer.state.global_step += 1
    with pytest.raises(DivergedError, match=f"the gradient's norm at step {2 * SKIPPED + 1}"):
        trainer._count_skipped()


def test_the_watch_remembers_the_first_step():
    watch = FiniteWatch(("a", "b"), torch.device("cpu"))
    for step, value in enumerate((1.0, math.inf, math.nan, 2.0), start=1):
        watch.note("b", torch.tensor([0.0, value]), step)
    assert watch.first()[1] == 2
    assert watch.has_arrived(watch.flag())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_large_numbers_are_finite_and_one_that_is_not_is_seen(dtype):
    tensors = [torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype), torch.ones(2), torch.ones(2, dtype=torch.uint8)]
    assert largest([*tensors, torch.empty(0)]).isfinite()
    for bad in (math.inf, -math.inf, math.nan):
        tensors[0][2, 4] = bad
        assert not largest(tensors).isfinite()
    assert largest([]).isfinite()


def test_a_loss_is_never_shown_as_nought():
    with pytest.raises(ConfigError, match="logging_nan_inf_filter=True would log"):
        TrainingArguments(output_dir="x", report_to=[], use_cpu=True, logging_nan_inf_filter=True)


@pytest.mark.parametrize("lora", [False, True])
def test_the_command_ends_with_status_1_and_one_line(lora, tmp_path, capsys):
    make_model(tmp_path / "model", "lladamoe")
    make_chat(tmp_path / "chat.jsonl", 12)
    options = {
        **{"model": tmp_path / "model", "dataset_args": tmp_path / "chat.jsonl", "output_dir": tmp_path / "run"},
        **{"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e25, "save_strategy": "steps"},
        **{"save_steps": 1, "logging_steps": 2, "report_to": "none", "disable_tqdm": True, "lora": lora},
    }
    assert main(["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("memdlm train: error: training diverged: the ")
    assert f"the last sound checkpoint is {tmp_path / 'run' / 'checkpoint-1'}" in last
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
    assert_sound(tmp_path / "run")
