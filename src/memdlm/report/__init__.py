"""Numbers -> pages: a report of runs, and the trace of a decoding."""

from memdlm.report.build import summary_rows, write_report
from memdlm.report.comparison import write_comparison

__all__ = ["summary_rows", "write_comparison", "write_report"]
