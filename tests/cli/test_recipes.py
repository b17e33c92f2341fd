"""A recipe's values are what its options take, or an error that names file, option and value, before anything runs."""

import math

import pytest

import memdlm.workflows.runs.train as workflow
from memdlm.cli.main import main
from memdlm.cli.recipe_files import read_recipe, typed_recipe
from memdlm.cli.train import OPTIONS
from memdlm.errors import ConfigError
from memdlm.training import TrainingArguments


def typed(folder, text):
    path = folder / "r.yaml"
    path.write_text(text)
    return typed_recipe(read_recipe(path), path, OPTIONS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("save_strategy: no", "no"),
        ("save_strategy: off", "no"),
        ("save_strategy: 'no'", "no"),
        ("logging_strategy: false", "no"),
        ("eval_strategy: epoch", "epoch"),
        ("learning_rate: 1e-4", 1e-4),
        ("learning_rate: 1.0e-4", 1e-4),
        ("learning_rate: 1", 1.0),
        ("max_steps: 12", 12),
        ("max_steps: '12'", 12),
        ("max_steps: -1", -1),
        ("save_steps: 0.5", 0.5),
        ("bf16: yes", True),
        ("bf16: 'on'", True),
        ("lora: False", False),
        ("adapter:", None),
        ("adapter: null", None),
        ("lr_scheduler_kwargs: {num_cycles: 2}", {"num_cycles": 2}),
        ("lr_scheduler_kwargs: '{\"num_cycles\": 2}'", '{"num_cycles": 2}'),
        ("report_to: tensorboard", "tensorboard"),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("label_names: labels", ["labels"]),
        ("include_for_metrics: [loss]", ["loss"]),
        ("mem_inner_target_modules: up_proj", "up_proj"),
        ("run_name: '2024'", "2024"),
        ("metric_for_best_model: nll", "nll"),
    ],
)
def test_what_can_only_mean_one_thing_is_that(text, value, tmp_path):
    (found,) = typed(tmp_path, text).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save_strategy: yes", "save_strategy: True is not possible. It takes one of no, steps, epoch, best."),
        ("eval_strategy: sometimes", "eval_strategy: value 'sometimes' is not known. Possible: no, steps, epoch"),
        ("max_steps: 2.5", "max_steps: 2.5 is not possible. It takes a whole number."),
        ("max_steps: 2.0", "max_steps: 2.0 is not possible"),
        ("max_steps: '2.5'", "max_steps: '2.5' is not possible. It takes a whole number."),
        ("max_steps: true", "max_steps: True is not possible"),
        ("max_steps: ten", "max_steps: 'ten' is not possible"),
        ("max_steps:", "max_steps: it has no value. It takes a whole number; leave the line out"),
        ("report_to:", "report_to: it has no value"),
        ("learning_rate: .nan", "learning_rate: nan is not finite. It takes a number."),
        ("learning_rate: -.inf", "learning_rate: -inf is not finite"),
        ("learning_rate: nan", "learning_rate: 'nan' is not"),
        ("weight_decay: 1e999", "weight_decay: '1e999' is not"),
        ("learning_rate: [1, 2]", "learning_rate: [1, 2] is not possible. It takes a number."),
        ("learning_rate: {a: 1}", "learning_rate: {'a': 1} is not possible"),
        ("learning_rate: 2024-01-01", "learning_rate: datetime.date(2024, 1, 1) is not possible"),
        ("learning_rate: false", "learning_rate: False is not possible"),
        ("learning_rate: 1" + "0" * 400, "learning_rate: int too large"),
        ("bf16: 1", "bf16: 1 is not possible. It takes true or false."),
        ("bf16: maybe", "bf16: 'maybe' is not possible"),
        ("lora: [true]", "lora: [True] is not possible"),
        ("run_name: 2024", "run_name: 2024 is not possible. It takes text. YAML does not read it as text"),
        ("run_name: 2024-01-01", "put it in quotes"),
        ("run_name: no", "run_name: False is not possible. It takes text."),
        ("model: [a, b]", "model: ['a', 'b'] is not possible. It takes text."),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs: [1] is not possible. It takes text or a mapping."),
        ("label_names: [1]", "label_names: 1 is not possible"),
        ("mem_inner_target_modules: [up_proj]", "mem_inner_target_modules: ['up_proj'] is not possible. It takes text"),
        ("report_to: [[a]]", "report_to: ['a'] is not possible"),
        ("schedule: 3", "schedule: 3 is not possible"),
        ("1: 2", "1 is no option; option names are text"),
        ("no: 2", "False is no option"),
        ("[1, 2]: 3", "is not valid YAML"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "'a' is given twice"),
        ("sede: 1", "option 'sede' is not known. Did you mean 'seed'?"),
        ("- a", "holds no options"),
        ("", "holds no options"),
        ("a: [", "is not valid YAML"),
        ("a: 2024-99-99", "is not valid YAML"),
        ("a: " + "[" * 3000, "is not valid YAML"),
        ("a: !!python/object:os.system {}", "is not valid YAML"),
    ],
    ids=lambda text: text[:40],
)
def test_anything_else_is_refused_by_name(text, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        typed(tmp_path, text)
    assert message in " ".join(str(caught.value).split())
    assert str(tmp_path / "r.yaml") in str(caught.value)


@pytest.mark.parametrize("content", [b"seed: \xff\xfe", b"\x80", b"seed: 1\x00"])
def test_bytes_that_are_no_text_are_refused(content, tmp_path):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_recipe(tmp_path / "r.yaml")


WRONG = {
    "per_device_train_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "max_steps": 0,
    "num_train_epochs": -1.0,
    "learning_rate": -1e-4,
    "weight_decay": math.inf,
    "max_grad_norm": math.nan,
    "adam_beta2": 1.0,
    "save_steps": 0,
    "logging_steps": -3,
    "eval_steps": math.nan,
    "seed": -1,
    "dataloader_num_workers": -2,
    "save_total_limit": 0,
    "mem_inner_lr": math.inf,
    "time_epsilon": math.nan,
}


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_numbers_that_cannot_be_meant_are_refused_in_flags_and_in_python(name, value, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workflow, "load_model", None)
    memory = {"mem_enabled": True} if name.startswith("mem_") else {}
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        TrainingArguments(output_dir=str(tmp_path), report_to=[], **memory, **{name: value})
    flags = [word for key, each in {**memory, name: value}.items() for word in (f"--{key}={each}",)]
    assert main(["train", "--model", "m", "--dataset_args", "d", "--output_dir", str(tmp_path), *flags]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("value", ["2.5", "ten", "", True])
def test_a_type_that_is_another_is_refused_in_python(value):
    with pytest.raises(ConfigError, match=r"^max_steps must be int, got"):
        TrainingArguments(output_dir="x", report_to=[], max_steps=value)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("cosine", {"foo": 1}, "unexpected keyword argument 'foo'"),
        ("polynomial", {"power": "x"}, "lr_scheduler_kwargs="),
        ("cosine_with_min_lr", {}, "lr_scheduler_type='cosine_with_min_lr'"),
        ("cosine_with_restarts", {"num_cycles": None}, "lr_scheduler_kwargs="),
        ("constant", {"num_cycles": 2}, "has no effect"),
        ("constant_with_warmup", {"num_cycles": 2}, "has no effect"),
    ],
)
def test_a_schedule_is_made_before_anything_is_loaded(kind, more, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainingArguments(output_dir="x", report_to=[], lr_scheduler_type=kind, lr_scheduler_kwargs=more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("linear", {}),
        ("constant", {}),
        ("cosine", {"num_cycles": 0.25}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("polynomial", {"lr_end": 0.0}),
        ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 3}),
    ],
)
def test_a_schedule_that_fits_is_taken(kind, more):
    arguments = TrainingArguments(output_dir="x", report_to=[], lr_scheduler_type=kind, lr_scheduler_kwargs=more)
    assert arguments.lr_scheduler_kwargs in (more, None)
