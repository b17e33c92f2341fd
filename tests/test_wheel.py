"""The wheel, installed alone in an empty folder, has all that a command needs; wheel and source archive are small."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.models import build_model
from tiny import CONFIGS

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "src" / "memdlm" / "recipes"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the wheel and the source archive, made without a network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder that has the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*install, str(wheel)], check=True)
    return folder


def run(words, installed, folder):
    """Standard output of a command of the installed wheel, run where the repository is out of sight."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["MEMDLM_CACHE"] = str(folder / "index")
    done = subprocess.run(
        [sys.executable, "-m", "memdlm", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_and_source_archive_are_small_and_have_every_recipe_once(built):
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.stat().st_size < 1.5e6
    assert archive.stat().st_size < 4e6
    files = {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.*")}
    assert len(files) > 40
    with zipfile.ZipFile(wheel) as zipped, tarfile.open(archive) as tarred:
        names = (zipped.namelist(), tarred.getnames())
    for members in names:
        found = [name.split("/recipes/")[1] for name in members if "/recipes/" in name and "." in name.split("/")[-1]]
        assert sorted(found) == sorted(files)


def test_a_named_recipe_of_the_installed_wheel_is_planned(installed, tmp_path):
    assert Path(run(["recipes", "--folder"], installed, tmp_path).strip()) == installed / "memdlm" / "recipes"
    tokenizer = build_word_tokenizer(f"w{index}" for index in range(20))
    config = CONFIGS["lladamoe"]()
    config.vocab_size = len(tokenizer)
    build_model(config, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": "w1 w2", "response": "w3"}
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    own = ["--model", "model", "--dataset_args", "chat.jsonl"]
    printed = run(["train", "llada_moe_1gpu_memdlm", *own, "--dry_run"], installed, tmp_path)
    assert "\n# steps               20\n" in printed
    (tmp_path / "mine.yaml").write_text(printed)
    assert run(["train", "mine.yaml", "--dry_run"], installed, tmp_path) == printed


def test_the_installed_wheel_helps(installed, tmp_path):
    assert "llada_moe_1gpu_memdlm" in run(["recipes"], installed, tmp_path)
    assert "memdlm train --help-all lists all" in run(["help", "train"], installed, tmp_path)
    assert "_memdlm_recipes" in run(["completion", "bash"], installed, tmp_path)


def test_the_long_description_has_no_address_that_a_package_index_cannot_follow(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as zipped:
        (name,) = (each for each in zipped.namelist() if each.endswith("/METADATA"))
        text = zipped.read(name).decode()
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(found) > 10
    assert [each for each in found if not each.startswith("https://")] == []
    pictures = [each for each in found if each.endswith((".png", ".svg"))]
    assert pictures
    for each in pictures:
        assert (ROOT / each.split("/main/")[1]).is_file(), each
