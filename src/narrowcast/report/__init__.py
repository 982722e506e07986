"""The truth about what happened, as plain data, as JSON and for the terminal."""

from narrowcast.report.data import LayerOutcome, Report, Totals
from narrowcast.report.findings import Finding
from narrowcast.report.terminal import finding_lines, format_bytes, report_table

__all__ = ["Finding", "LayerOutcome", "Report", "Totals", "finding_lines", "format_bytes", "report_table"]
