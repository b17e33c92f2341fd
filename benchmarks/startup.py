"""What starting costs: CPU seconds (user and system) of fresh processes, for help pages and for loading a small model.

    python benchmarks/startup.py [--rounds 3] [--out benchmarks/results/startup.json]

The least of some rounds counts: other programs on the machine can only add. `torch` and `transformers` are the imports
below which loading cannot come; beside each row is its ratio to an import of torch in the same run, which does not
depend on the machine as much. Exits 1 when a help page takes 1 second or more, or loading 3.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from memdlm.cli.main import COMMANDS
from memdlm.models import LLaDAMoEConfig, build_model

IMPORTS = {
    "python": "pass",
    "import memdlm": "import memdlm",
    "import torch": "import torch",
    "import transformers.modeling_utils": "import torch, transformers.modeling_utils",
    "import peft": "import torch, transformers.modeling_utils, peft",
    "import memdlm.models": "import memdlm.models",
}


def cpu_seconds(command: list[str]) -> float:
    """Return what the process and its children used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        config = LLaDAMoEConfig(
            vocab_size=512,
            hidden_size=64,
            expert_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
        )
        build_model(config, seed=0).save_pretrained(folder)
        load = f"import memdlm; memdlm.load_model({folder!r})"
        commands = {name: [sys.executable, "-c", code] for name, code in {**IMPORTS, "load_model": load}.items()}
        commands |= {f"{name} --help": [sys.executable, "-m", "memdlm", name, "--help"] for name in COMMANDS}
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                found[name].append(cpu_seconds(command))
    least = {name: min(times) for name, times in found.items()}
    for name, seconds in least.items():
        print(f"{name:36} {seconds:6.2f} s, {seconds / least['import torch']:5.2f} times an import of torch")
    if options.out is not None:
        facts = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cpu_seconds": found,
        }
        options.out.write_text(json.dumps(facts, indent=2) + "\n")
    pages = max(seconds for name, seconds in least.items() if name.endswith("--help"))
    return 0 if pages < 1 and least["load_model"] < 3 else 1


if __name__ == "__main__":
    sys.exit(main())
