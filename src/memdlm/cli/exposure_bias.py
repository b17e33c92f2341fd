"""`memdlm exposure-bias --model A [--model2 B] --dataset_args FILE [--mem_enabled True]`: parse, measure, say."""

import shlex
from collections.abc import Sequence

from memdlm.cli.decoding import SWITCH, MemoryFlags
from memdlm.cli.output import note, say
from memdlm.cli.parsing import DataclassParser
from memdlm.memory.flags import memory_from_flags
from memdlm.report.data import bias_rows
from memdlm.workflows.runs.exposure_bias import JSON_NAME, PICTURE_NAME, BiasOptions, measure_exposure_bias


def main(argv: Sequence[str]) -> int:
    """Measure, and print a line per model."""
    parser = DataclassParser(
        (BiasOptions, MemoryFlags),
        prog="memdlm exposure-bias",
        description="Loss while a model decodes from its own tokens against its loss on the true ones, step by step.",
    )
    options, flags = parser.parse({}, argv)
    memory = memory_from_flags(vars(flags), parser.given, is_on=options.mem_enabled, switch=SWITCH)
    command = f"memdlm exposure-bias {shlex.join(argv)}"
    data = measure_exposure_bias(options, memory, say=note, command=command)
    for row in bias_rows(data):
        if row["seeds"]:
            figures = "  ".join(
                f"{words} {row[name][0]:.3f}" if row[name][0] is not None else f"{words} undefined"
                for words, name in (
                    ("max ratio", "max_ratio"),
                    ("max matched ratio", "max_matched"),
                    ("mean sequential", "sequential"),
                    ("mean static", "static"),
                )
            )
            say(f"{row['model']}, memory {'on' if row['memory'] else 'off'}: {figures}")
    say(f"{options.output}: {JSON_NAME}, {PICTURE_NAME}")
    return 0
