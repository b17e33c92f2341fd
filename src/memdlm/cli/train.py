"""`memdlm train [RECIPE ...] [--option value ...]`: parse, build, run."""

from collections.abc import Sequence
from typing import Any

from memdlm.cli.output import say
from memdlm.cli.parsing import DataclassParser
from memdlm.cli.recipe_files import read_recipe, typed_recipe
from memdlm.cli.recipes import find
from memdlm.errors import ConfigError
from memdlm.models.lora.adapters import LoRAOptions
from memdlm.training.arguments import TrainingArguments
from memdlm.workflows.display import Display
from memdlm.workflows.runs.options import DataOptions, ModelOptions, RunOptions
from memdlm.workflows.runs.plan import RunPlan, describe_plan
from memdlm.workflows.runs.train import run_training

OPTIONS = (ModelOptions, LoRAOptions, DataOptions, RunOptions, TrainingArguments)


def main(argv: Sequence[str]) -> int:
    """Train, and say where the result is; with --dry_run, say what would be done."""
    parser = DataclassParser(
        OPTIONS,
        prog="memdlm train",
        usage="memdlm train [RECIPE ...] [--option value ...]",
        description="Train a model. A recipe is a flat YAML file of options. Later recipes override earlier ones, and "
        "flags override recipes.",
    )
    parser.add_argument(
        "recipe", nargs="*", metavar="RECIPE", help="name of a recipe (memdlm recipes lists them), or a YAML file"
    )
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    recipe: dict[str, Any] = {}
    for path in map(find, argv[:count]):
        recipe |= typed_recipe(read_recipe(path), path, OPTIONS)
    model, lora, data, run, arguments, others = parser.parse(recipe, argv[count:])
    if others.recipe:
        raise ConfigError(f"{others.recipe[0]!r}: recipes come before the options. memdlm train {others.recipe[0]} ...")
    if run.dry_run:
        say(describe_plan(RunPlan(model=model, lora=lora, data=data, run=run, arguments=arguments), Display()))
        return 0
    out = run_training(model, data, arguments, lora, run)
    if arguments.process_index == 0:
        say(str(out))
    return 0
