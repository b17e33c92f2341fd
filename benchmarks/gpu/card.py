"""What the parts of `make gpu` share: a device, its clock and peak memory, and a file that is written as rows come in.

A part is a table of jobs. Each gives one row of raw figures. Rows that the file already holds are not measured again;
when the part's seconds are used up it stops, and another call goes on with the next job.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # counting, published_loops

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
Row = dict[str, Any]
Jobs = Mapping[str, Callable[[], Row]]


@dataclass(frozen=True, slots=True)
class Card:
    """The device that is measured. `is_quick`: tiny sizes, to see that everything runs; no result."""

    device: torch.device
    is_quick: bool = False

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the wall-clock seconds of one call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def in_turns(
        self, calls: Mapping[str, Callable[[], Any]], repetitions: int, warm: int = 2
    ) -> dict[str, list[float]]:
        """Return every call's seconds; the calls take turns, after `warm` rounds that are not counted; a quick
        run has one round of each."""
        repetitions, warm = (1, min(warm, 1)) if self.is_quick else (repetitions, warm)
        found: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(warm + repetitions):
            for name, call in calls.items():
                seconds = self.seconds(call)
                if index >= warm:
                    found[name].append(seconds)
        return found

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return the most bytes that the device held during one call; None on the CPU."""
        if not self.is_cuda:
            call()
            return None
        self.clean()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return int(torch.cuda.max_memory_allocated(self.device))

    def free_bytes(self) -> int:
        """Return the bytes that are free on the device; on the CPU a number that any tiny model fits in."""
        if not self.is_cuda:
            return 2**31
        self.clean()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def clean(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def described(self) -> Row:
        """Return what a figure depends on besides the code."""
        found: Row = {
            "card": platform.processor() or platform.machine(),
            "driver": None,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "commit": _said_by("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
            "cpu_cores": os.cpu_count(),
        }
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.device)
            found |= {
                "card": properties.name,
                "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "cards": torch.cuda.device_count(),
            }
        return found


def _said_by(*command: str) -> str | None:
    """Return the first line that a program prints; None where it is missing or fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def spread(seconds: list[float]) -> Row:
    """Return all repetitions and their median."""
    return {"seconds": [round(each, 6) for each in seconds], "median_s": round(statistics.median(seconds), 6)}


def arguments(part: str, doc: str, budget: int) -> argparse.Namespace:
    """Read the flags that all parts take."""
    parser = argparse.ArgumentParser(prog=part, description=doc.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run? No result")
    parser.add_argument("--force", action="store_true", help="measure again what the file already holds")
    parser.add_argument("--budget", type=float, default=budget, help="seconds, after which no further job starts")
    parser.add_argument("--jobs", nargs="+", help="these jobs only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all cards; one folder each is made in it")
    options = parser.parse_args()
    options.started = time.monotonic()
    if options.quick and options.out.resolve() == RESULTS:
        parser.error("--quick gives no results: name another folder with --out.")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --quick --out FOLDER tries everything on the CPU.")
    return options


def card_of(options: argparse.Namespace) -> Card:
    return Card(torch.device(options.device), options.quick)


def path_of(card: Card, part: str, out: Path) -> Path:
    """Return the file of a part: <out>/<name of the card>/<part>.json."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", card.described()["card"]).strip("-") if card.is_cuda else "cpu"
    return out / name / f"{part}.json"


def run_part(part: str, jobs: Jobs, options: argparse.Namespace, about: Mapping[str, Any] | None = None) -> int:
    """Measure the jobs that the part's file does not hold; returns the exit status: 1 if a job failed.

    `about` says what holds for all rows. A job that fails is a row too, with its error, and is tried again next time:
    the others' figures must not be lost with it.
    """
    card = card_of(options)
    path = path_of(card, part, options.out)
    record = _begun(part, card, path, is_new=options.force) | {"about": dict(about or {}), "complete": False}
    wanted = list(options.jobs or jobs)
    unknown = sorted(set(wanted) - set(jobs))
    if unknown:
        raise SystemExit(f"{part}: no jobs called {', '.join(unknown)}; there are {', '.join(jobs)}.")
    for name in wanted:
        if "failed" not in record["rows"].get(name, {"failed": ""}):
            continue
        if time.monotonic() - options.started > options.budget:
            print(f"{part}: its {options.budget:.0f} seconds are used up; call it again to go on.", flush=True)
            break
        record["rows"][name] = _row(part, name, jobs[name])
        _write(path, record)
    record["complete"] = all("failed" not in record["rows"].get(name, {"failed": ""}) for name in jobs)
    record["rows"] = {name: record["rows"][name] for name in jobs if name in record["rows"]}
    _write(path, record)
    return int(any("failed" in row for row in record["rows"].values()))


def _row(part: str, name: str, job: Callable[[], Row]) -> Row:
    start = time.perf_counter()
    try:
        row = job()
    except Exception as error:  # whatever it is: it goes into the file, and the status says so
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {error}"[:2000]}
    row["took_s"] = round(time.perf_counter() - start, 1)
    print(part, name, json.dumps(row), flush=True)
    return row


def _begun(part: str, card: Card, path: Path, *, is_new: bool) -> Row:
    """Return the record to go on with; rows of another card, driver, torch or size are not mixed with new ones."""
    machine = card.described()
    fresh: Row = {"part": part, "is_quick": card.is_quick, "machine": machine, "rows": {}}
    if is_new or not path.exists():
        return fresh
    old = json.loads(path.read_text())
    told = {"is_quick": (old["is_quick"], card.is_quick)}
    told |= {key: (old["machine"][key], machine[key]) for key in ("card", "driver", "torch")}
    for key, (then, now) in told.items():
        if then != now:
            raise SystemExit(
                f"{path}: its rows were measured with {key} {then!r}, here it is {now!r}. Move the file away to keep "
                "it, or replace it with --force (make: FORCE=1)."
            )
    return fresh | {"rows": old["rows"]}


def _write(path: Path, record: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)
