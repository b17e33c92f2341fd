"""The recipes of CONTRIBUTING.md, followed in a copy of the package; and what a package brings along."""

import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml

import memdlm

ROOT = Path(__file__).parents[1]
RECIPES = dict(
    re.findall(r"^### (Add [^\n]+)\n(.*?)(?=^##)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
)
BLOCK = re.compile(r"^```python\n# ([^\n]+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_can_be_followed(recipe, tmp_path):
    package = tmp_path / "memdlm"
    shutil.copytree(ROOT / "src" / "memdlm", package, ignore=shutil.ignore_patterns("__pycache__"))
    *added, (what, check) = BLOCK.findall(RECIPES[recipe])
    assert what == "see it work"
    assert added
    assert run(check, tmp_path).returncode != 0, "without the recipe it must not work"
    for name, code in added:
        path = package / name
        path.write_text(f"{path.read_text()}\n\n{code}" if path.exists() else code)
    done = run(check, tmp_path)
    assert done.returncode == 0, done.stderr


def test_there_are_three_recipes():
    assert list(RECIPES) == ["Add a strategy", "Add a family", "Add a command"]


def test_type_checkers_may_read_the_package():
    assert resources.files("memdlm").joinpath("py.typed").is_file()


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == memdlm.__version__
    assert cited["license"] == "Apache-2.0"
