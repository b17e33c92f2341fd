"""`memdlm demo [--out runs/demo] [--quick] [--seed N]`: train and compare small models, offline."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from transformers.utils import logging

from memdlm.cli.output import say
from memdlm.cli.parsing import Parser
from memdlm.models.hub.devices import AUTO, DEVICE_HELP
from memdlm.report.model import Part, check_report
from memdlm.report.tables import accuracy_rows
from memdlm.workflows.console import PlainConsole
from memdlm.workflows.display import Display
from memdlm.workflows.studies.demo import run_demo
from memdlm.workflows.studies.demo_plan import plan_for


def main(argv: Sequence[str]) -> int:
    """Run the demo and show its table."""
    parser = Parser(prog="memdlm demo", description="Train small models with and without memory, and compare them.")
    parser.add_argument("--out", default="runs/demo", help="folder for the report and the checkpoints")
    parser.add_argument("--quick", action="store_true", help="run an easier task with fewer steps: under 2 minutes")
    parser.add_argument("--seed", type=int, default=0, help="first seed; the next one is used as well")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo in the folder")
    parser.add_argument("--device", default=AUTO, help=DEVICE_HELP)
    options = parser.parse_args(list(argv))
    plan, out = plan_for(options.seed, quick=options.quick, device=options.device), Path(options.out)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    display = Display()
    found = run_demo(plan, out, display, f"memdlm demo {shlex.join(argv)}".strip(), overwrite=options.overwrite)
    report, console = check_report(found), PlainConsole()
    if report.recall is not None:
        console.print(_table(report.recall, "Facts out of attention's reach: accuracy in percent"))
    console.print(_table(report, "Open book: accuracy in percent"))
    say(f"The full report: {out / 'report.html'}")
    if report.tries:
        say(f"\nTry it: write {out / 'note.txt'} into a memory, ask for a fact of it, and look at the memory.")
        for command in (*_activation(), *report.tries):
            say(f"  {command}")
    return 0


def _activation() -> Iterator[str]:
    """Yield the command that makes `memdlm` known to the shell, if it is not yet, as after `make demo`."""
    script = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("memdlm") is None and script.is_file():
        here = Path.cwd()
        yield f"source {shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))}"


def _table(part: Part, title: str) -> Table:
    table = Table(title=f"{title}, mean over seeds (chance {100 * (part.task.chance or 0):.1f})")
    table.add_column("model")
    table.add_column("memory")
    rows = accuracy_rows(part)
    for cell in rows[0].cells:
        table.add_column(f"{cell.length} words", justify="right")
    for row in rows:
        cells = [f"{100 * (cell.mean or 0):.1f} +- {100 * (cell.spread or 0):.1f}" for cell in row.cells]
        table.add_row(row.model, "on" if row.memory else "off", *cells)
    return table
