"""`memdlm train [RECIPE.yaml ...] [--option value ...]`: parse, build, run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from memdlm.cli.output import say
from memdlm.cli.parsing import DataclassParser
from memdlm.errors import ConfigError
from memdlm.models.outer_adapters import LoRAOptions
from memdlm.training.arguments import TrainingArguments
from memdlm.workflows.display import Display
from memdlm.workflows.options import DataOptions, ModelOptions, RunOptions
from memdlm.workflows.plan import RunPlan, describe_plan
from memdlm.workflows.train import run_training


def main(argv: Sequence[str]) -> int:
    """Train, and say where the result is; with --dry_run, say what would be done."""
    parser = DataclassParser(
        (ModelOptions, LoRAOptions, DataOptions, RunOptions, TrainingArguments),
        prog="memdlm train",
        usage="memdlm train [RECIPE.yaml ...] [--option value ...]",
        description="Train a model. Recipes are flat YAML files of the options below; later ones, and flags, override.",
    )
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    recipe: dict[str, Any] = {}
    for path in argv[:count]:
        recipe |= read_recipe(Path(path))
    model, lora, data, run, arguments = parser.parse(recipe, argv[count:])
    if run.dry_run:
        say(describe_plan(RunPlan(model=model, lora=lora, data=data, run=run, arguments=arguments), Display()))
        return 0
    out = run_training(model, data, arguments, lora, run)
    if arguments.process_index == 0:
        say(str(out))
    return 0


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a flat YAML mapping; raises ConfigError when there is no such file or it is something else."""
    if not path.is_file():
        raise ConfigError(f"recipe: {str(path)!r} is no file.")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe: {path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"recipe: {path} holds no options; it must be a mapping, one `option: value` per line.")
    return found
