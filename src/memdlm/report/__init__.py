"""Pages: reports of runs, and traces of decoding."""

from memdlm.report.build import write_report
from memdlm.report.comparison import write_comparison
from memdlm.report.tables import summary_rows

__all__ = ["summary_rows", "write_comparison", "write_report"]
