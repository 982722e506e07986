"""The truth about what happened, as plain data, as JSON and for the terminal."""

from narrowcast.report.data import LayerChange, LayerOutcome, Report, Totals
from narrowcast.report.terminal import format_bytes, report_table

__all__ = ["LayerChange", "LayerOutcome", "Report", "Totals", "format_bytes", "report_table"]
