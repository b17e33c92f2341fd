"""The command line of the two studies of English, their JSON, and their table."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from page_measures import MEMORY
from pages import Corpus
from reading import ARMS, SIZES, Run, run
from study_rows import Rows

from memdlm.errors import ConfigError

SHARES = {arm: 0.7 if arm == MEMORY else 0.3 for arm in ARMS}
"""Of a seed's minutes: a step with memory costs several of one without."""
OF_MEMORY = ("reads_on", "targets", "whole_until")
"""Options that say how a memory is trained."""
RESULTS = Path("benchmarks/study/results")


def parsed(name: str, doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--size", default="1M", choices=[size for size in SIZES if size != "smoke"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--minutes", type=float, default=60.0, help="of a seed's training, all arms together")
    parser.add_argument("--steps", type=int, help="instead of a time; of every arm")
    parser.add_argument("--reader_steps", type=int, default=0, help="of reading exercises before; not in the time")
    parser.add_argument("--reads_on", action="store_true", help="exercises beside the memory's training, too")
    parser.add_argument("--targets", help="projections that get fast weights, instead of the preset's")
    parser.add_argument("--batch", type=int, help="rows of a step, but for exercises before")
    parser.add_argument("--whole_until", type=float, help="share of the steps that hide answers as a whole")
    parser.add_argument("--pages", type=int, default=128, help="documents that are asked about")
    parser.add_argument("--validation", action="store_true", help="other documents, for choices")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny: no result")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    options = parser.parse_args()
    for name in OF_MEMORY:
        if getattr(options, name) and options.arms != [MEMORY]:
            parser.error(f"--{name} is for --arms {MEMORY} alone: the other network is trained without memory.")
    if options.whole_until is not None and not 0 < options.whole_until < 1:
        parser.error(f"--whole_until is a share of the steps, between 0 and 1, not {options.whole_until}.")
    return options


def main(make: Callable[..., Corpus], doc: str) -> None:
    """Train and measure what the command line asks for, on the corpus that `make` makes."""
    options = parsed(make.name, doc)
    if not options.device.startswith("cuda"):
        torch.set_num_threads(1)
    if options.smoke:
        options.size, options.steps, options.pages = "smoke", 4, 4
        options.reader_steps = min(options.reader_steps, 4)
    corpus = make(is_tiny=options.smoke)
    with tempfile.TemporaryDirectory() as passing:
        rows = Rows(Path(passing, "smoke.json") if options.smoke else options.out)
        measure(options, corpus, rows)
        print(markdown(rows.found["rows"]))


def measure(options: argparse.Namespace, corpus: Corpus, rows: Rows) -> None:
    """Add the rows that are missing."""
    part = "validation" if options.validation else "test"
    memory = {name: getattr(options, name) for name in OF_MEMORY}
    for seed in options.seed:
        for arm in options.arms:
            budget = {"steps": options.steps} if options.steps else {"minutes": options.minutes * SHARES[arm]}
            key = {"size": options.size, "seed": seed, "arm": arm, "part": part, "pages": options.pages, **budget}
            # None, as older rows have none of them.
            how = {"reader_steps": options.reader_steps, "batch": options.batch}
            key |= {name: value or None for name, value in (how | memory).items()}
            if rows.where(**key):
                continue
            wanted = Run(
                corpus=corpus,
                size=options.size,
                arm=arm,
                seed=seed,
                device=options.device,
                pages=options.pages,
                part=part,
                reader_steps=options.reader_steps,
                batch=options.batch,
                **memory,
            )
            seconds = None if options.steps else 60 * budget["minutes"]
            try:
                found = run(wanted, seconds=seconds, steps=options.steps)
            except ConfigError as error:
                raise SystemExit(str(error)) from error
            rows.add(key | {"device": device_name(options.device)} | found)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table: one line per network and way of asking, then how its kinds of questions fare.

    `chosen` is empty in rows that are older than this figure.
    """
    out = [
        "| size | seed | part | exercises | way | exact match | one shot | chosen | nats per token | steps | CPU s |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        alike = {f"{way}, facts alike": each for way, each in row.get("alike", {}).items()}
        for way, each in (row["measured"] | alike).items():
            chosen = f"{each['chosen']:.3f}" if "chosen" in each else ""
            figures = f"{each['exact']:.3f} | {each['one_shot']:.3f} | {chosen} | {each['loss']:.3f}"
            exercises = f"{row.get('reader_steps') or 'none'}{' before, and beside' if row.get('reads_on') else ''}"
            about = f"{row['size']} | {row['seed']} | {row['part']} | {exercises}"
            out.append(f"| {about} | {way} | {figures} | {row['steps']} | {row['cpu_seconds']:.0f} |")
    out += ["", "| size | seed | asked with | exact match by kind |", "|---" * 4 + "|"]
    for row in rows:
        for way, each in row["measured"].items():
            kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in each["kinds"].items())
            out.append(f"| {row['size']} | {row['seed']} | {way} | {kinds} |")
    return "\n".join(out)
