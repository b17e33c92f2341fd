"""What loading a mixture of experts takes in memory, as a multiple of its file.

    python benchmarks/loading.py [--layers 10] [--out benchmarks/results/loading.json]

A checkpoint of random bfloat16 weights in published names and several shards is made in a temporary folder. Every way
of loading it runs in a fresh process, which loads a tiny checkpoint first, so that imports are not counted. Counted is
the growth of the resident set from there to its highest point (VmHWM less VmRSS: anonymous pages and those of mapped
files), over the bytes of all shards; `anonymous` is the anonymous part of the growth once the model is there. "before"
stacks experts with transformers' own operations, as this package did, in the same run.
Exits 1 when the plain way takes more than 1.1 times the file.
"""

import argparse
import contextlib
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peak import resident_mb
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from memdlm.models import LLaDA2MoeConfig, LLaDAMoEConfig, build_model, families, load_model, loading

WANTED = 1.1
WAYS = {"before": {}, "now": {}, "now, float32": {"dtype": "float32"}, "now, 4 bits": {"load_in_4bit": True}}
COMMON = {"vocab_size": 8192, "num_attention_heads": 8, "num_experts_per_tok": 4, "dtype": "bfloat16"}


def config_of(family: str, layers: int, hidden: int, width: int, experts: int) -> object:
    common = {**COMMON, "hidden_size": hidden, "num_hidden_layers": layers, "num_experts": experts}
    if family == "LLaDA-MoE":
        return LLaDAMoEConfig(**common, expert_intermediate_size=width)
    return LLaDA2MoeConfig(
        **common, moe_intermediate_size=width, intermediate_size=4 * width, num_key_value_heads=4, n_group=4
    )


def make(folder: Path, config: object, shard: str) -> int:
    model = build_model(config, seed=0).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def as_before() -> None:
    """Stack gate and up apart, then both side by side, with transformers reading ahead."""
    loading._tensor_by_tensor = contextlib.nullcontext
    register = families.register_checkpoint_conversion_mapping

    def plain(converter: object) -> object:
        if not isinstance(converter, WeightConverter):
            return converter
        operations = [MergeModulelist(dim=0), Concatenate(dim=1)][: len(converter.source_patterns)]
        return WeightConverter(converter.source_patterns, converter.target_patterns, operations=operations)

    families.register_checkpoint_conversion_mapping = lambda name, all_of_it, overwrite: register(
        name, [plain(each) for each in all_of_it], overwrite=overwrite
    )


def anonymous_mb() -> float:
    return resident_mb("RssAnon")


def child(way: str, folder: Path, tiny: Path) -> dict[str, float]:
    if way == "before":
        as_before()
    load_model(tiny, **WAYS[way])
    before, anonymous = resident_mb("VmRSS", reset=True), anonymous_mb()
    model = load_model(folder, **WAYS[way])
    peak = resident_mb("VmHWM") - before
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    return {
        "peak_mb": peak,
        "after_mb": resident_mb("VmRSS") - before,
        "anonymous_mb": anonymous_mb() - anonymous,
        "weights_mb": weights / 2**20,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "TINY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, folder, tiny = options.child
        print(json.dumps(child(way, Path(folder), Path(tiny))))
        return 0
    found = {}
    for family in ("LLaDA-MoE", "LLaDA2"):
        with tempfile.TemporaryDirectory() as name:
            folder, tiny = Path(name) / "large", Path(name) / "tiny"
            size = make(folder, config_of(family, options.layers, 512, 256, 64), "100MB")
            make(tiny, config_of(family, 2, 64, 32, 8), "1MB")
            shards = len(list(folder.glob("*.safetensors")))
            rows = {}
            for way in WAYS:
                command = [sys.executable, __file__, "--child", way, str(folder), str(tiny)]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                row = json.loads(out.splitlines()[-1])
                row["peak_over_file"] = row["peak_mb"] * 2**20 / size
                row["peak_over_weights"] = row["peak_mb"] / row["weights_mb"]
                rows[way] = row
                print(family, f"{size / 2**20:.0f} MB in {shards} shards", way, row)
            found[family] = {"file_mb": size / 2**20, "shards": shards, "ways": rows}
    if options.out is not None:
        facts = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "families": found,
        }
        options.out.write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if all(each["ways"]["now"]["peak_over_file"] <= WANTED for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
