"""The completion script, in a real bash: commands, options, values, recipes and files are offered."""

import shutil
import subprocess
import sys

import pytest

from memdlm.cli import recipes
from memdlm.cli.main import COMMANDS, main

ASK = """
source "$1"; shift
words=("$@"); COMP_WORDS=("${words[@]}"); COMP_CWORD=$(( ${#words[@]} - 1 )); COMPREPLY=()
$(complete -p memdlm | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "script"
    command = [sys.executable, "-m", "memdlm", "completion", "bash"]
    path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], {"train"}),
        ([""], {*COMMANDS, "help"}),
        (["help", "exp"], {"exposure-bias"}),
        (["train", "llada_moe_1gpu_me"], {"llada_moe_1gpu_memdlm"}),
        (["train", "ablations/cl"], {name for name in recipes.names() if name.startswith("ablations/cl")}),
        (["train", "mi"], {"mine.yaml"}),
        (["train", "--mem_inner_r"], {"--mem_inner_rank"}),
        (["train", "llada_moe_1gpu_memdlm", "--dry"], {"--dry_run"}),
        (["train", "--lora", ""], {"True", "False"}),
        (["generate", "--model", "mi"], {"mine.yaml"}),
        (["recipes", "llada_8b_1gpu_r"], {"llada_8b_1gpu_recall"}),
        (["completion", "z"], {"zsh"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_is_offered_what_could_follow(words, offered, script, tmp_path):
    (tmp_path / "mine.yaml").touch()
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", script, "memdlm", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_there_is_a_script_for_other_shells(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "--mem_inner_rank" in script


def test_completing_imports_nothing_slow():
    code = """
import sys
from memdlm.cli.main import main
for words in (["completion", "bash"], ["recipes"], ["recipes", "llada_moe_1gpu_memdlm"], ["help", "chat"]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
sys.exit(any(each in sys.modules for each in ("torch", "transformers", "peft", "numpy", "rich")))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
