"""`memdlm recipes [NAME]`: list the recipes that come with memdlm, or print one."""

from collections.abc import Sequence
from pathlib import Path

from memdlm.cli.output import say
from memdlm.cli.parsers import Parser
from memdlm.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parents[1] / "recipes"
"""The recipes, part of the installed package. Launch configurations are in its folders accelerate and slurm."""


def main(argv: Sequence[str]) -> int:
    """Print names with what they are, one file, or where the files are."""
    parser = Parser(
        prog="memdlm recipes", description="List the recipes that memdlm train takes by name, or print one."
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to print; none: list all of them")
    parser.add_argument(
        "--folder",
        action="store_true",
        help="print the folder of the recipes; it also has launch configurations, in accelerate and slurm",
    )
    options = parser.parse_args(list(argv))
    if options.folder:
        if options.name is not None:
            raise ConfigError(f"--folder and {options.name!r}: give one of them.")
        say(str(FOLDER))
    elif options.name is not None:
        say(_named(options.name).read_text(encoding="utf-8").rstrip("\n"))
    else:
        say(listed())
    return 0


def names() -> list[str]:
    """Return the names of all recipes: whole ones first, then the small ones that change a whole one."""
    whole = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [*whole, *sorted(f"ablations/{path.stem}" for path in (FOLDER / "ablations").glob("*.yaml"))]


def find(word: str) -> Path:
    """Return the file of a recipe: the file of that name if there is one, else the recipe that comes with memdlm."""
    path = Path(word)
    return path if path.is_file() else _named(word)


def _named(word: str) -> Path:
    name = word.removesuffix(".yaml")
    if name not in names():
        close = did_you_mean(Path(name).name, names()) or " memdlm recipes lists the names."
        raise ConfigError(f"recipe: {word!r} is no file and no recipe of memdlm.{close}")
    return FOLDER / f"{name}.yaml"


def listed() -> str:
    """Return all names with the first line of each file."""
    found = {name: (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0] for name in names()}
    width = max(map(len, found))
    lines = [f"{name:<{width}}  {line.removeprefix('#').strip()}" for name, line in found.items()]
    return "\n".join(
        [
            *lines,
            "",
            "memdlm train NAME [--option value ...] starts one. An ablation follows a whole recipe: memdlm train NAME",
            "ablations/loss_kl. memdlm train NAME --dry_run > mine.yaml writes a copy to change.",
        ]
    )
