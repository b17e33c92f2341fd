"""What bounds a write that stays below 60 % of the matrix peak: a profile of each family's longest one.

    python benchmarks/gpu/profiling.py

Reads the `writes` part of the same card. A row holds the operations that took most of the device's time, and the share
of the wall-clock time in which the device did nothing: a large one means that it waits for the host.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from card import Card, Row, arguments, card_of, path_of, run_part
from shapes import Shelf
from torch.profiler import ProfilerActivity, profile
from writes import FAMILIES, WANTED, write_of

TOP = 25


def profiled(card: Card, shelf: Shelf, rows: int, length: int, family: str, share: float) -> Row:
    """Profile one write; `share` of the peak is what it reached in `writes`."""
    found = shelf.of(family)
    write = write_of(found.model, rows, length)
    write()
    seconds = card.seconds(write)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card.is_cuda else [])]
    with profile(activities=activities) as profiler:
        write()
        card.wait()
    events = list(profiler.key_averages())
    time_of = lambda event: event.self_device_time_total if card.is_cuda else event.self_cpu_time_total
    # Kernels are events of their own, beside the operations that started them: counted once.
    if card.is_cuda:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(time_of(event) for event in events) / 1e6
    events.sort(key=time_of, reverse=True)
    return {
        "family": family,
        "rows": rows,
        "length": length,
        "share_of_peak": share,
        **found.about(),
        "unprofiled_s": seconds,
        "busy_s": busy,
        "idle_share": max(0.0, 1 - busy / seconds),
        "top": [
            {
                "name": event.key[:160],
                "calls": event.count,
                "ms": time_of(event) / 1e3,
                "share": time_of(event) / 1e6 / busy,
            }
            for event in events[:TOP]
        ],
    }


def jobs_of(card: Card, written: dict[str, Any], wanted: float) -> dict[str, Callable[[], Row]]:
    """Return a job for the longest write of each family that stayed below `wanted`."""
    shelf, jobs = Shelf(card, {}), {}
    for family in FAMILIES:
        low = [row for row in written.values() if row.get("family") == family and row.get("share_of_peak", 1) < wanted]
        if low:
            row = max(low, key=lambda each: (each["rows"] * each["length"], each["length"]))
            jobs[f"{family} {row['rows']} x {row['length']}"] = partial(
                profiled, card, shelf, row["rows"], row["length"], family, row["share_of_peak"]
            )
    return jobs


def main() -> int:
    options = arguments("profile", __doc__, budget=180)
    card = card_of(options)
    path = path_of(card, "writes", options.out)
    if not path.exists():
        raise SystemExit(f"profile: {path} is missing; measure the writes first (make gpu PART=writes).")
    written = json.loads(path.read_text())["rows"]
    return run_part("profile", jobs_of(card, written, WANTED), options, {"wanted_share_of_peak": WANTED})


if __name__ == "__main__":
    raise SystemExit(main())
