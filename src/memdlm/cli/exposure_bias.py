"""`memdlm exposure-bias --model A [--model2 B] --dataset_args FILE [--mem_enabled True]`: parse, measure, say."""

import shlex
from collections.abc import Sequence

from memdlm.cli.decoding import SWITCH, MemoryFlags
from memdlm.cli.output import note, say
from memdlm.cli.parsing import DataclassParser
from memdlm.memory.flags import memory_from_flags
from memdlm.report.tables import bias_rows
from memdlm.workflows.runs.exposure_bias import JSON_NAME, PICTURE_NAME, BiasOptions, measure_exposure_bias


def main(argv: Sequence[str]) -> int:
    """Measure, and print a line per model."""
    parser = DataclassParser(
        (BiasOptions, MemoryFlags),
        prog="memdlm exposure-bias",
        description="Compare, step by step, a model's loss given its own tokens with its loss given the true ones.",
    )
    options, flags = parser.parse({}, argv)
    memory = memory_from_flags(vars(flags), parser.given, is_on=options.mem_enabled, switch=SWITCH)
    command = f"memdlm exposure-bias {shlex.join(argv)}"
    measured = measure_exposure_bias(options, memory, say=note, command=command)
    for row in bias_rows(measured):
        if row.seeds:
            figures = "  ".join(
                f"{words} undefined" if found.mean is None else f"{words} {found.mean:.3f}"
                for words, found in (
                    ("max ratio", row.max_ratio),
                    ("max matched ratio", row.max_matched),
                    ("mean sequential", row.sequential),
                    ("mean static", row.static),
                )
            )
            say(f"{row.model}, memory {'on' if row.memory else 'off'}: {figures}")
    say(f"{options.output}: {JSON_NAME}, {PICTURE_NAME}")
    return 0
