"""`memdlm train [RECIPE.yaml] [--option value ...]`: parse, build, run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from memdlm.cli.parsing import DataclassParser
from memdlm.errors import ConfigError
from memdlm.models.outer_adapters import LoRAOptions
from memdlm.training.arguments import TrainingArguments
from memdlm.workflows.options import DataOptions, ModelOptions, RunOptions
from memdlm.workflows.train import run_training


def main(argv: Sequence[str]) -> int:
    """Train, and say where the result is."""
    parser = DataclassParser(
        (ModelOptions, LoRAOptions, DataOptions, RunOptions, TrainingArguments),
        prog="memdlm train",
        usage="memdlm train [RECIPE.yaml] [--option value ...]",
        description="Train a model; flags override the recipe, a flat YAML file of the same options.",
    )
    recipe, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    model, lora, data, run, arguments = parser.parse({} if recipe is None else read_recipe(Path(recipe)), rest)
    print(run_training(model, data, arguments, lora, run))
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
