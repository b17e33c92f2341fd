"""`run.json`: identifies the run that wrote a folder."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from memdlm.files import replace_files
from memdlm.version import __version__
from memdlm.workflows.runs.datasets import RunData
from memdlm.workflows.runs.plan import RunPlan, resolved
from memdlm.workflows.runs.resuming import RUN_FILE, earlier_run

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "deepspeed")


def write_run_file(plan: RunPlan, data: RunData, checkpoint: Path | None, changed: Sequence[str] = ()) -> None:
    """Write options, versions, seeds, commit and data of a run into its output folder.

    `changed` lists how the run differs from the one that wrote `checkpoint`; earlier changes stay listed.
    """
    arguments = plan.arguments
    earlier = None if checkpoint is None else earlier_run(checkpoint)
    facts = {
        "memdlm": __version__,
        "commit": source_commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "changed_on_resume": [*(earlier or {}).get("changed_on_resume", ()), *changed],
        "seed": arguments.seed,
        "data_seed": arguments.data_seed,
        "options": resolved(plan),
        "world_size": arguments.world_size,
        "device": str(arguments.device),
        "device_name": torch.cuda.get_device_name() if arguments.device.type == "cuda" else platform.processor(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "data": {
            "counts": {split: dataclasses.asdict(counts) for split, counts in data.counts.items()},
            "manifest": data.manifest,
        },
    }
    replace_files({Path(arguments.output_dir) / RUN_FILE: (json.dumps(facts, indent=2) + "\n").encode()})


def source_commit() -> dict[str, Any] | None:
    """Return the commit of this package's git checkout and whether files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return {"id": commit, "modified": bool(_git(here, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or no git here


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
