"""The truth about what happened, as plain data, as JSON and for the terminal."""

from narrowcast.report.data import LayerChange, LayerOutcome, Report, StepError, Totals
from narrowcast.report.findings import Finding
from narrowcast.report.terminal import finding_lines, format_bytes, report_table

__all__ = [
    "Finding",
    "LayerChange",
    "LayerOutcome",
    "Report",
    "StepError",
    "Totals",
    "finding_lines",
    "format_bytes",
    "report_table",
]
