"""Names that people know: the published project's options are taken, and recipes are called by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from memdlm.cli import names, recipes
from memdlm.cli.main import main
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.models import build_model
from tiny import CONFIGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny LLaDA-MoE in the published layout, and conversations."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = build_word_tokenizer(f"w{index}" for index in range(20))
    config = CONFIGS["lladamoe"]()
    config.vocab_size = len(tokenizer)
    build_model(config, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"w{n % 9} w1", "response": f"w2 w{n % 7}"} for n in range(12)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working directory with the model and the data."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))
    return tmp_path / "here"


TRAIN = ["llada_moe_1gpu_memdlm", "--max_steps", "1", "--bf16", "False", "--report_to", "none", "--max_length", "64"]


# Published names. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["--model_name_or_path", "--model-name-or-path"])
def test_a_published_name_does_what_ours_does(spelling):
    flags = ["--model", "--adapter", "--cfg_scale"]
    assert names.translated([spelling, "m", "--cfg=2", "x"], flags) == ["--model", "m", "--cfg_scale=2", "x"]
    assert names.translated([f"{spelling}=m"], flags) == ["--model=m"]
    assert names.translated(["--", spelling, "m"], flags) == ["--", spelling, "m"]


@given(st.lists(st.sampled_from(["--model", "--seed=3", "m", "-x", "--", "", "--unknown", "--cfg_scale", "a=b"])))
def test_words_that_are_no_published_names_stay_as_they_are(words):
    assert names.translated(words, ["--model", "--seed", "--cfg_scale"]) == words


@given(st.sampled_from(sorted(names.ALIASES)), st.sampled_from(["0.5", "false", "x"]), st.booleans())
def test_every_published_name_becomes_one_of_our_flags_with_one_value(name, value, is_joined):
    flags = [f"--{ours}" for ours in names.ALIASES[name].ours]
    words = [f"--{name}={value}"] if is_joined else [f"--{name}", value]
    try:
        found = names.translated(["w", *words, "z"], flags)
    except ConfigError:
        found = []
    if not found:
        assert name in ("group_by_length", "warmup_ratio")
        return
    assert (found[0], found[-1]) == ("w", "z")
    told = "=".join(found[1:-1]).split("=")
    assert len(told) == 2
    assert told[0] in flags


def test_a_command_that_has_the_published_name_itself_keeps_it():
    assert names.translated(["--cfg", "2"], ["--cfg", "--cfg_scale"]) == ["--cfg", "2"]
    assert names.translated(["--cfg", "2"], ["--model"]) == ["--cfg", "2"]


@pytest.mark.parametrize(
    ("words", "becomes"),
    [
        (["--group_by_length", "True"], ["--train_sampling_strategy=group_by_length"]),
        (["--group_by_length"], ["--train_sampling_strategy=group_by_length"]),
        (["--group_by_length=false", "--seed", "1"], ["--train_sampling_strategy=random", "--seed", "1"]),
        (["--warmup_ratio", "0.1"], ["--warmup_steps=0.1"]),
    ],
)
def test_values_are_translated_where_they_mean_something_else(words, becomes):
    assert names.translated(words, ["--train_sampling_strategy", "--warmup_steps", "--seed"]) == becomes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model_name_or_path", "a", "--model", "a"],
            "--model_name_or_path and --model are names of the same option",
        ),
        (["--model=a", "--model_name_or_path=b"], "--model and --model_name_or_path are names of the same option"),
        (["--model_name_or_path", "a", "--base_model_name_or_path", "b"], "are names of the same option"),
        (["--warmup_ratio", "20"], r"warmup_ratio='20' is not possible. It takes a number from 0 to below 1"),
        (["--group_by_length", "maybe"], r"group_by_length='maybe' is not possible"),
    ],
)
def test_two_names_of_one_option_and_impossible_values_are_errors(words, message):
    with pytest.raises(ConfigError, match=message):
        names.translated(words, ["--model", "--warmup_steps", "--train_sampling_strategy"])


def test_both_names_are_an_error_on_the_command_line(here, capsys):
    assert main(["generate", "--model", "model", "--model_name_or_path", "model", "w1"]) == 2
    assert "names of the same option: give one of them" in capsys.readouterr().err
    assert main(["train", "--model", "model", "--dataset_name", "chat.jsonl", "--dataset_args", "x"]) == 2
    assert "--dataset_name and --dataset_args" in capsys.readouterr().err


def test_published_names_train_generate_and_preprocess(here, capsys):
    data = ["--model_name_or_path", "model", "--dataset_args", "chat.jsonl"]
    assert main(["preprocess", *data, "--output_dir", "data/chat"]) == 0
    more = ["--group_by_length", "True", "--warmup_ratio", "0.1", "--output_dir", "runs/a"]
    assert main(["train", *TRAIN, *data, *more]) == 0
    capsys.readouterr()
    flags = ["--max_new_tokens", "2", "w1"]
    ours = ["generate", "--model", "model", "--adapter", "runs/a", *flags]
    published = ["generate", "--base_model_name_or_path", "model", "--adapter_model_name_or_path", "runs/a", *flags]
    shown = []
    for words in (ours, published):
        assert main(words) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""
    assert main(["merge", "--adapter_model_name_or_path", "runs/a", "--output", "merged", "--dtype", "float32"]) == 0


def test_two_adapters_of_one_model_are_compared(here, capsys):
    data = ["--model_name_or_path", "model", "--dataset_args", "chat.jsonl"]
    fast = ["--learning_rate", "0.1", "--warmup_ratio", "0"]
    for seed in ("1", "2"):
        assert main(["train", *TRAIN, *data, "--seed", seed, *fast, "--output_dir", f"a{seed}"]) == 0
    bias = ["exposure-bias", "--model_name_or_path", "model", "--dataset_name", "chat.jsonl", "--num_steps", "2"]
    bias += ["--num_samples", "2", "--output", "bias"]
    adapters = ["--adapter_model_name_or_path", "a1", "--model2_adapter_model_name_or_path", "a2"]
    capsys.readouterr()
    assert main([*bias, *adapters]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["model with a1", "model with a2"]
    assert lines[0].split(": ")[1] != lines[1].split(": ")[1]
    assert main([*bias, "--adapter", "a1", "--adapter2", "a1", "--overwrite"]) == 2
    assert "model2 is the same as model" in capsys.readouterr().err


def test_a_recipe_may_use_published_names(here, capsys):
    (here / "r.yaml").write_text("model_name_or_path: model\ngroup_by_length: true\ndataset_args: chat.jsonl\n")
    assert main(["train", "r.yaml", "--dry_run", "--output_dir", "x"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["model"], found["train_sampling_strategy"]) == ("model", "group_by_length")
    (here / "r.yaml").write_text("model_name_or_path: model\nmodel: model\ndataset_args: chat.jsonl\n")
    assert main(["train", "r.yaml", "--dry_run", "--output_dir", "x"]) == 2
    assert "r.yaml: model_name_or_path is another name of model" in capsys.readouterr().err


def test_model_arguments_take_published_names():
    given = {"model_name_or_path": "m", "adapter_model_name_or_path": "a", "cfg": "0.5"}
    settings = parse_arguments(given)
    assert (settings.options.pretrained, settings.options.adapter) == ("m", "a")
    assert settings.generation["cfg_scale"] == 0.5
    with pytest.raises(
        ConfigError, match="adapter and adapter_model_name_or_path are names of the same model argument"
    ):
        parse_arguments({"pretrained": "m", "adapter": "a", "adapter_model_name_or_path": "a"})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["preprocess", "--model", "m", "--dataset_args", "d", "--output_dir", "o", "--sft_map_fn_path", "f"],
            "--column_map names their columns",
        ),
        (["chat", "--model", "m", "--chat_template", "False"], "memdlm chat uses it"),
        (["eval", "--model", "m", "--tasks", "t", "--num_gpu", "4"], "accelerate launch --num_processes N"),
        (["merge", "--adapter", "a", "--output", "b", "--push_to_hub", "x"], "hf upload"),
    ],
)
def test_a_published_option_without_counterpart_says_what_to_do(words, told, capsys):
    pytest.importorskip("lm_eval") if words[0] == "eval" else None
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not known. It is an option of the published project: " in error
    assert told in error


def test_the_page_for_newcomers_names_every_published_name():
    page = (ROOT / "docs" / "migrating.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert set(names.ALIASES) | set(names.NOT_HERE) <= named
    assert {ours for alias in names.ALIASES.values() for ours in alias.ours} <= named


# Recipes. -----------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_their_first_line_and_printed(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in recipes.names():
        first = (recipes.FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        assert re.search(rf"^{name} +{re.escape(first.removeprefix('# '))}$", listed, re.M)
    assert main(["recipes", "ablations/loss_kl"]) == 0
    assert capsys.readouterr().out == (recipes.FOLDER / "ablations" / "loss_kl.yaml").read_text()
    assert main(["recipes", "--folder"]) == 0
    assert Path(capsys.readouterr().out.strip()) == recipes.FOLDER


def test_a_name_that_is_no_recipe_is_refused(here, capsys):
    for command in (["recipes", "llada_moe_1gpu_memdlmm"], ["train", "llada_moe_1gpu_memdlmm"]):
        assert main(command) == 2
        assert "Did you mean 'llada_moe_1gpu_memdlm'?" in capsys.readouterr().err
    assert main(["train", "recipes/llada_moe_1gpu_memdlm.yaml"]) == 2
    assert "Did you mean 'llada_moe_1gpu_memdlm'?" in capsys.readouterr().err
    assert main(["train", "--lora", "True", "llada_moe_1gpu_memdlm", "--model", "m", "--dataset_args", "d"]) == 2
    assert "recipes come before the options" in capsys.readouterr().err


def test_a_file_goes_before_a_recipe_of_the_same_name(here, capsys):
    (here / "llada_moe_1gpu_memdlm").write_text("model: model\ndataset_args: chat.jsonl\noutput_dir: mine\n")
    assert main(["train", "llada_moe_1gpu_memdlm", "--dry_run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["output_dir"] == "mine"


def test_recipes_have_one_home():
    homes = {path.parent.resolve() for path in ROOT.rglob("llada_moe_1gpu_memdlm.yaml") if ".venv" not in path.parts}
    assert homes == {recipes.FOLDER.resolve()}
    assert (ROOT / "recipes").resolve() == recipes.FOLDER.resolve()


def test_what_a_dry_run_prints_is_a_recipe_for_any_machine(here, capsys):
    data = ["--model", "model", "--dataset_args", "chat.jsonl[train:8,test:4]"]
    assert main(["train", *TRAIN[:-4], "--max_length", "64", *data, "--dry_run", "--output_dir", "runs/a"]) == 0
    printed = capsys.readouterr().out
    found = yaml.safe_load(printed)
    assert not {"use_cpu", "dataloader_pin_memory", "disable_tqdm", "activation_checkpointing"} & set(found)
    assert found["report_to"] == "auto"
    (here / "mine.yaml").write_text(printed)
    assert main(["train", "mine.yaml", "--dry_run"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["train", "mine.yaml", "--report_to", "none"]) == 0
    assert (here / "runs" / "a" / "adapter_model.safetensors").is_file()
    # What was asked for stays.
    capsys.readouterr()
    assert main(["train", "mine.yaml", "--use_cpu", "--report_to", "none", "--dry_run"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["use_cpu"], found["report_to"]) == (True, "none")


def test_a_recipe_without_evaluation_data_trains_and_says_so(here, capsys):
    data = ["--model", "model", "--dataset_args", "chat.jsonl", "--output_dir", "runs/a"]
    assert main(["train", *TRAIN, *data]) == 0
    told = capsys.readouterr().err
    assert "nothing is evaluated: chat.jsonl has no split for it. To evaluate, name eval_dataset_args" in told
    assert not any(line.startswith("eval ") for line in told.splitlines())
    assert "nothing is evaluated" not in _trained(["--dataset_args", "chat.jsonl[train:8,test:4]"], capsys)


def _trained(more, capsys):
    assert main(["train", *TRAIN, "--model", "model", *more, "--eval_steps", "1", "--output_dir", "runs/b"]) == 0
    told = capsys.readouterr().err
    assert any(line.startswith("eval ") for line in told.splitlines())
    return told


def test_without_evaluation_data_no_best_checkpoint_can_be_kept(here, capsys):
    flags = ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss", "--output_dir", "runs/a"]
    assert main(["train", *TRAIN, "--model", "model", "--dataset_args", "chat.jsonl", *flags]) == 2
    assert "load_best_model_at_end=True, but there is nothing to evaluate on" in capsys.readouterr().err
