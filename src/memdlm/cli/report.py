"""`memdlm report RUN [RUN ...] --output report.html`: read runs, write one page."""

from collections.abc import Sequence
from pathlib import Path

from memdlm.cli.output import say
from memdlm.cli.parsing import Parser
from memdlm.report.comparison import write_comparison


def main(argv: Sequence[str]) -> int:
    """Write the page, and print its path."""
    parser = Parser(
        prog="memdlm report", description="Put training runs, evaluations and demos side by side on one page."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a demo, a training run, lm-eval results or an exposure-bias measurement",
    )
    parser.add_argument("--output", default="report.html", help="HTML file to write; it needs no other file")
    options = parser.parse_args(list(argv))
    say(str(write_comparison([Path(run) for run in options.runs], Path(options.output))))
    return 0
