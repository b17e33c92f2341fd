"""Whatever is typed, a command ends in a status and at most one error line, and its inputs stay as they were."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "fuzz_commands.py"


def wrong(seed, count, seconds):
    """Run `count` command lines in a process that can write nowhere but in a new folder; return what went wrong."""
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="memdlm-fuzz-") as folder:
        Path(folder).chmod(0o755)  # nobody must get there, where root runs this
        done = subprocess.run(
            [sys.executable, str(WORKER), f"{folder}/all", str(seed), str(count)],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
        )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    assert lines[-1].get("done") == count, done.stderr[-2000:]
    return lines[:-1]


def test_a_few_command_lines():
    assert wrong(0, 15, 300) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_many_command_lines(seed):
    assert wrong(seed, 500, 3600) == []
