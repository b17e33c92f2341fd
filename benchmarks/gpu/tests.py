"""The tests that need a GPU, one file a job.

    python benchmarks/gpu/tests.py

With `--device cpu --quick` the same files run their checks of the CPU against itself.
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from card import ROOT, Row, arguments, run_part

FOLDER = ROOT / "tests" / "gpu"


def tested(name: str, mark: str, seconds: float) -> Row:
    """Run one file of tests; raises RuntimeError with the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", mark, f"--junitxml={report}", "-rs", str(FOLDER / name)]
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode} and left no report.")
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [f"{c.get('classname')}::{c.get('name')}" for c in cases if {"failure", "error"} & {e.tag for e in c}]
    skipped = {
        f"{case.get('name')}": element.get("message", "")
        for case in cases
        for element in case
        if element.tag == "skipped"
    }
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(cases)} failed: {', '.join(bad)}")
    # 5: pytest found no test with this mark.
    if done.returncode not in (0, 5):
        raise RuntimeError(f"pytest ended with status {done.returncode}.")
    return {"passed": len(cases) - len(skipped), "skipped": skipped}


def main() -> int:
    options = arguments("tests", __doc__, budget=420)
    mark = "gpu" if options.device.startswith("cuda") else "not gpu and not slow"
    names = sorted(path.name for path in FOLDER.glob("test_*.py"))
    left = lambda: max(30.0, options.budget + 45 - (time.monotonic() - options.started))
    jobs = {name: partial(lambda each: tested(each, mark, left()), name) for name in names}
    return run_part("tests", jobs, options)


if __name__ == "__main__":
    raise SystemExit(main())
