"""The truth about what happened, as plain data, as JSON and for the terminal."""

from narrowcast.report.data import LayerChange, LayerOutcome, Report, StepError, Totals
from narrowcast.report.terminal import format_bytes, report_table

__all__ = ["LayerChange", "LayerOutcome", "Report", "StepError", "Totals", "format_bytes", "report_table"]
