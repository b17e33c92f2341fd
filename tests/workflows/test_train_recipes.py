"""Every recipe and overlay is understood, complete, and as it is named; a dry run says what would be done."""

import json
import re
from pathlib import Path

import pytest
import yaml

from memdlm.cli.main import main
from memdlm.cli.parsing import DataclassParser
from memdlm.cli.recipe_files import read_recipe
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig
from memdlm.models import LoRAOptions, add_outer_lora, build_model, load_model
from memdlm.training import TrainingArguments
from memdlm.workflows.runs.options import DataOptions, ModelOptions, RunOptions
from memdlm.workflows.runs.plan import RunPlan, resolved
from tiny import CONFIGS

RECIPES = Path(__file__).parents[2] / "src" / "memdlm" / "recipes"
WHOLE = sorted(RECIPES.glob("*.yaml"))
OVERLAYS = sorted((RECIPES / "ablations").glob("*.yaml"))
NAME = re.compile(
    r"(llada_8b|llada_moe|llada21_mini|dream_7b|a2d_qwen3_06b|sdar_4b)_(1gpu|8gpu)_(mdlm|memdlm|recall|bd3lm)"
)


def parse(recipe, argv=()):
    parts = (ModelOptions, LoRAOptions, DataOptions, RunOptions, TrainingArguments)
    model, lora, data, run, arguments = DataclassParser(parts).parse(recipe, argv)
    return RunPlan(model=model, lora=lora, data=data, run=run, arguments=arguments)


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_a_recipe_is_complete_and_what_its_name_says(path, tmp_path):
    recipe = read_recipe(path)
    plan = parse(recipe, ["--output_dir", str(tmp_path)])
    method = NAME.fullmatch(path.stem)[3]
    assert plan.arguments.mem_enabled == (method in ("memdlm", "recall"))
    # What is not as published trains a block-causal network as it decodes.
    is_block_causal = path.stem.startswith("llada21") and method in ("recall", "bd3lm")
    block = 4 if path.stem.startswith("sdar") else 32 if is_block_causal else None
    assert plan.arguments.block_size == block
    if method == "recall":
        shown = {"sync_inner": False}  # what training makes of "unset"
        assert plan.arguments.memory == MemoryConfig.recall(**shown)
    assert (plan.model.load_in_4bit, plan.lora.r, plan.lora.lora_alpha) == (True, 32, 64)
    assert (plan.data.max_length, plan.data.truncation) == (4096, "filter")
    assert (plan.arguments.learning_rate, plan.arguments.lr_scheduler_type) == (2e-5, "cosine")
    assert recipe["output_dir"] == f"runs/{path.stem}"
    assert path.read_text().startswith("# ")


def test_there_is_a_recipe_for_every_backbone_machine_and_method():
    # Block diffusion is for the block-causal families alone, and SDAR is trained by nothing else.
    bidirectional = ("mdlm", "memdlm", "recall")
    methods = {
        **dict.fromkeys(("llada_8b", "llada_moe", "dream_7b", "a2d_qwen3_06b"), bidirectional),
        "llada21_mini": (*bidirectional, "bd3lm"),
        "sdar_4b": ("bd3lm", "memdlm", "recall"),
    }
    expected = {
        (family, machine, method) for family in methods for machine in ("1gpu", "8gpu") for method in methods[family]
    }
    found = [NAME.fullmatch(path.stem).groups() for path in WHOLE]
    assert len(found) == len(expected)
    assert set(found) == expected


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_changes_a_memdlm_recipe(path, tmp_path):
    base, overlay = read_recipe(RECIPES / "llada_moe_8gpu_memdlm.yaml"), read_recipe(path)
    changed = parse(base | overlay, ["--output_dir", str(tmp_path)]).arguments.memory
    assert changed != parse(base, ["--output_dir", str(tmp_path)]).arguments.memory


def test_what_a_dry_run_prints_is_a_recipe_of_the_same_run(tmp_path):
    recipe = read_recipe(RECIPES / "llada_moe_1gpu_memdlm.yaml") | {"output_dir": str(tmp_path)}
    plan = parse(recipe, ["--mem_inner_lr", "0.5", "--dry_run"])
    printed = yaml.safe_load(yaml.safe_dump(resolved(plan)))
    assert printed["mem_inner_lr"] == 0.5
    again = parse(printed)
    assert resolved(again) == resolved(plan)
    assert (again.model, again.lora, again.data) == (plan.model, plan.lora, plan.data)
    assert again.arguments.memory == plan.arguments.memory


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A tiny LLaDA-MoE in the published layout, and conversations."""
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))
    tokenizer = build_word_tokenizer(f"w{index}" for index in range(20))
    config = CONFIGS["lladamoe"]()
    config.vocab_size = len(tokenizer)
    build_model(config, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"w{n % 9} w1", "response": f"w2 w{n % 7}"} for n in range(30)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(tmp_path / "model"), "--dataset_args", f"{tmp_path / 'chat.jsonl'}[train:20,test:10]"]


def test_a_dry_run_counts_without_loading_weights(tiny_run, tmp_path, capsys):
    model = load_model(tmp_path / "model")
    total = sum(parameter.numel() for parameter in model.parameters())
    add_outer_lora(model, LoRAOptions())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    (tmp_path / "model" / "model.safetensors").unlink()
    recipe = str(RECIPES / "llada_moe_1gpu_memdlm.yaml")
    out = tmp_path / "run"
    assert main(["train", recipe, *tiny_run, "--dry_run", "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    numbers = dict(re.findall(r"^# ([a-z -]+?) {2,}([\d,.]+)$", printed, re.MULTILINE))
    assert numbers["parameters"] == f"{total:,}"
    assert numbers["trained"] == f"{trained:,}"
    # 20 rows in pairs, 5 epochs, a tenth of the steps to warm up.
    assert [numbers[name] for name in ("rows", "rows per step", "steps", "warm-up steps")] == ["20", "2", "50", "5"]
    assert float(numbers["sum"]) >= 0
    assert not out.exists()


def test_the_recall_recipe_trains_a_four_bit_base_and_saves_what_it_learned(tiny_run, tmp_path):
    recipe, out = str(RECIPES / "llada_moe_1gpu_recall.yaml"), tmp_path / "run"
    flags = ["--max_steps", "2", "--bf16", "False", "--save_strategy", "no", "--eval_strategy", "no"]
    flags += ["--mem_inner_layer_fraction", "0.5", "--report_to", "none"]
    assert main(["train", recipe, *tiny_run, *flags, "--output_dir", str(out)]) == 0
    assert list(out.rglob("memory_init.safetensors"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mem_inner_lrate", "1"], "Did you mean '--mem_inner_lr'"),
        (["--r", "8", "--lora", "False", "--load_in_4bit", "False"], "r=8 has no effect without lora=True"),
        (["--lora", "False"], "load_in_4bit=True without an adapter"),
        (["--adapter", "x"], "not both"),
        (["--resume", "latest", "--overwrite_output_dir"], "contradict each other"),
        (["--modules_to_save", "lm_head"], "modules_to_save='lm_head' is not supported"),
        (["--eval_strategy", "sometimes"], "eval_strategy|valid"),
        (["--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
    ],
)
def test_a_wrong_flag_ends_with_one_line(flags, message, tiny_run, tmp_path, capsys):
    recipe = str(RECIPES / "llada_moe_1gpu_memdlm.yaml")
    assert main(["train", recipe, *tiny_run, "--dry_run", "--output_dir", str(tmp_path), *flags]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors.splitlines()[-1]), errors


def test_an_unknown_key_of_a_recipe_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"'mem_inner_rnk' is not known.+Did you mean 'mem_inner_rank'"):
        parse({"mem_inner_rnk": 3, "model": "x", "dataset_args": "y"})


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "cpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type.value == kinds.get(path.stem, "DEEPSPEED")
    if path.stem == "cpu":
        assert (config.num_processes, config.use_cpu) == (2, False)
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("value", [5e-5, 2e-5, 1e-4])
def test_a_resolved_option_is_there_whatever_transformers_has_as_its_default(value, tmp_path):
    plan = parse({"model": "x", "dataset_args": "y", "output_dir": str(tmp_path), "learning_rate": value})
    for printed in (resolved(plan), resolved(plan, as_asked=True)):
        assert parse(printed).arguments.learning_rate == value
