"""Everything that a GPU has to answer, in parts of at most 8 minutes: `make gpu`, or `make gpu PART=writes`.

    python benchmarks/gpu/run.py [PART ...] [--force]

A part that is complete is not run again; one that is not goes on where it stopped. At the end `page.html` beside the
results compares all cards that were measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import page
import torch
from card import RESULTS, ROOT, Card, path_of

HERE = Path(__file__).parent
PARTS = {
    "tests": "tests.py",
    "peaks": "peaks.py",
    "writes": "writes.py",
    "steps": "steps.py",
    "decoding": "decoding.py",
    "profile": "profiling.py",
    "study": "study.py",
}
"""In the order in which they are run; `profile` reads what `writes` found."""
LONGEST = 480
"""Seconds, after which a part is ended; its rows so far are kept."""


def is_complete(path: Path) -> bool:
    return path.exists() and bool(json.loads(path.read_text())["complete"])


def run(part: str, options: argparse.Namespace) -> str:
    """Run one part in a process of its own; returns how it ended."""
    path = path_of(Card(torch.device(options.device), options.quick), part, options.out)
    if is_complete(path) and not options.force:
        return "complete already"
    command = [sys.executable, str(HERE / PARTS[part]), "--device", options.device, "--out", str(options.out)]
    command += ["--quick"] * options.quick + ["--force"] * options.force
    command += ["--jobs", *options.jobs] if options.jobs else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        status = subprocess.run(command, env=environment, timeout=LONGEST, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"ended after {LONGEST} seconds; its rows so far are kept, call it again to go on"
    if status:
        return f"failed with status {status}"
    return "complete" if is_complete(path) else "not complete: call it again to go on"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run? No result")
    parser.add_argument("--force", action="store_true", help="run complete parts again, from the beginning")
    parser.add_argument("--jobs", nargs="+", help="of one part: these jobs only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no parts called {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if options.jobs and len(options.parts) != 1:
        parser.error("--jobs belongs to one part: name it.")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --quick --out FOLDER tries everything on the CPU.")
    if options.quick and options.out.resolve() == RESULTS:
        parser.error("--quick gives no results: name another folder with --out.")
    ends = {}
    for part in options.parts or PARTS:
        start = time.monotonic()
        ends[part] = run(part, options)
        print(f"{part}: {ends[part]} ({time.monotonic() - start:.0f} s)", flush=True)
    written = page.write(options.out)
    print(f"all cards: {written}")
    return int(any("failed" in end or "ended" in end for end in ends.values()))


if __name__ == "__main__":
    raise SystemExit(main())
