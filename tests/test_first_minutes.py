"""A newcomer's first minutes: the README's commands, typed as printed, one after the other, in one shell.

What is left out: fetching the repository, and installing. The environment is made here, from the packages that run this
test, so that `make` finds it finished.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from memdlm.data.wording import GOODS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository with a finished environment in .venv."""
    folder = tmp_path_factory.mktemp("first") / "memdlm"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in listed.split("\0"):
        if name and not name.startswith("tests/golden") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    venv.create(folder / ".venv", symlinks=True)
    packages = next((folder / ".venv" / "lib").glob("python*")) / "site-packages"
    (packages / "others.pth").write_text("\n".join([str(folder / "src"), *filter(os.path.isdir, sys.path[1:])]) + "\n")
    command = folder / ".venv" / "bin" / "memdlm"
    command.write_text(f"#!{folder / '.venv' / 'bin' / 'python'}\nimport sys\nfrom memdlm.cli.main import main\n"
                       "sys.exit(main())\n")  # fmt: skip
    command.chmod(0o755)
    (folder / ".venv" / ".package").touch()
    return folder


def typed(folder, *commands):
    """What a shell prints that gets the commands one after the other; each must succeed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def first_commands():
    """The README's bash lines up to the end of "Ask your own file"."""
    text = (ROOT / "README.md").read_text().split("## What the demo shows")[0]
    return [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]


def quick(line):
    return re.sub(r"^make demo\b", 'make demo ARGS="--quick --device cpu"', line)


def test_the_commands_begin_with_the_two_and_then_activate():
    commands = first_commands()
    assert [line.split("#")[0].split()[:2] for line in commands[1:4]] == [
        ["make", "demo"], ["make", "test"], ["source", ".venv/bin/activate"],
    ]  # fmt: skip
    assert commands[0].startswith("git clone ")


@pytest.mark.slow
def test_the_readme_can_be_typed_and_so_can_what_the_demo_prints(clone):
    lines = [quick(line) for line in first_commands() if not line.startswith(("git clone", "make test"))]
    out = typed(clone, *lines)
    assert out.splitlines()[-1].strip() in GOODS[:8], "the answer to the last question"
    printed = out.split("Try it: ")[1].split("\n  ")[1:5]
    assert printed[0] == "source .venv/bin/activate", "the shell does not know memdlm yet"
    commands = [printed[0], *(line.splitlines()[0] for line in printed[1:])]
    told = typed(clone, *commands)
    assert "tokens written in" in told
    assert re.search(rf"^({'|'.join(GOODS[:8])})$", told, re.M)
    page = (clone / "runs" / "demo" / "report.html").read_text()
    assert 'class="finding"' in page
