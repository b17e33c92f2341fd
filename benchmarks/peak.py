"""Resident memory of this process, for benchmarks that measure a peak in a process of its own (Linux)."""

import gc
from pathlib import Path


def resident_mb(field: str, *, reset: bool = False) -> float:
    """A line of /proc/self/status (VmRSS: now, VmHWM: most), in MB; `reset` lets the high-water mark start here."""
    if reset:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024
