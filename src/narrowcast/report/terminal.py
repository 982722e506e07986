"""The report as a table for people."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.report.data import LayerOutcome, Report, Totals
from narrowcast.report.findings import Finding


def format_bytes(count: float) -> str:
    """1234567 -> "1.23 MB" (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def report_table(report: Report) -> Table:
    """One row per weight; float vectors that were kept for the same reason share a row."""
    # Text everywhere: a plain string is markup to rich, which would swallow the "[avx2]" of a kernel's name
    table = Table(title=Text(f"{report.model}, recipe {report.recipe or 'unnamed'}"), title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("outcome", "weight", "input"):
        table.add_column(name)
    for name in ("bits", "bytes", "SQNR w", "SQNR out", "speed"):
        table.add_column(name, justify="right")
    table.add_column("kernel or reason", overflow="fold")
    grouped: dict[str, list[LayerOutcome]] = {}
    for row in report.layers:
        if row.type == "Parameter":
            grouped.setdefault(row.reason, []).append(row)
            continue
        table.add_row(*map(Text, _cells(row)))
    for reason, rows in grouped.items():
        size = sum(row.bytes_after for row in rows)
        name = rows[0].layer if len(rows) == 1 else f"{rows[0].layer} and {len(rows) - 1} more"
        table.add_row(Text(name), "kept", "", "", "", format_bytes(size), "", "", "", Text(reason))
    return table


def _cells(row: LayerOutcome) -> tuple[str, ...]:
    explanation = "; ".join(part for part in (row.reason, row.kernel) if part)
    speed = "" if row.speedup is None else f"{row.speedup:.2f}x"
    return (
        row.layer, row.outcome, row.spec, row.input, f"{row.bits_per_weight:.2f}", format_bytes(row.bytes_after),
        _decibel(row.weight_sqnr_db), _decibel(row.output_sqnr_db), speed, explanation,
    )  # fmt: skip


def _decibel(value: float | None) -> str:
    return "" if value is None else ("exact" if value == float("inf") else f"{value:.1f} dB")


def totals_lines(totals: Totals) -> list[str]:
    """The sums, one statement per line."""
    share = totals.bytes_after / totals.bytes_before if totals.bytes_before else 1.0
    quantized = totals.quantized_parameters / totals.parameters if totals.parameters else 0.0
    integer = totals.integer_parameters / totals.parameters if totals.parameters else 0.0
    lines = [
        f"bytes      {format_bytes(totals.bytes_before)} -> {format_bytes(totals.bytes_after)} ({share:.1%})",
        f"quantized  {quantized:.1%} of all parameters; {totals.coverage:.1%} of those in layers that can be",
        f"integers   {integer:.1%} of all parameters are multiplied in integers"
        + (
            "; share of multiply-accumulates not known without data"
            if totals.integer_macs is None
            else f", {totals.integer_macs:.1%} of multiply-accumulates"
        ),
    ]
    if totals.output_sqnr_db is not None:
        lines.append(f"output     SQNR {_decibel(totals.output_sqnr_db)} on the first batch")
    if totals.float_ms and totals.quantized_ms:
        lines.append(
            f"speed      {totals.float_ms:.2f} ms float32, {totals.quantized_ms:.2f} ms quantized: "
            f"{totals.float_ms / totals.quantized_ms:.2f}x, first batch of {totals.timed_samples}, "
            f"{totals.threads} threads, medians, interleaved"
        )
    memory = (
        ""
        if totals.peak_memory_bytes is None
        else f", peak memory of the process {format_bytes(totals.peak_memory_bytes)}"
    )
    lines.append(f"cost       {totals.seconds:.1f} s{memory}")
    return lines


_NAMED = 3


_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_HOLE = "\0"


def solver_notes(layers: list[LayerOutcome]) -> list[str]:
    """What solvers said, sentences that differ in numbers only as one, with the layers that they are about."""
    about: dict[str, list[tuple[str, list[str]]]] = {}
    for row in layers:
        for note in row.notes:
            about.setdefault(_NUMBER.sub(_HOLE, note), []).append((row.layer, _NUMBER.findall(note)))
    return [_joined(sentence, said) for sentence, said in about.items()]


def _joined(sentence: str, said: list[tuple[str, list[str]]]) -> str:
    """One sentence with the span of each of its numbers, and the names of the first layers."""
    spans = []
    for numbers in zip(*(found for _, found in said), strict=True):
        low, high = min(numbers, key=float), max(numbers, key=float)
        spans.append(low if low == high else f"{low} .. {high}")
    parts = sentence.split(_HOLE)
    text = parts[0] + "".join(span + part for span, part in zip(spans, parts[1:], strict=True))
    names = [name for name, _ in said]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{text}: {', '.join(names[:_NAMED])}{more}"


def finding_lines(findings: list[Finding]) -> list[str]:
    """What the calibration doctor says, one finding per line."""
    return [f"{finding.severity:<10} data: {finding}" for finding in findings]


def render(report: Report) -> str:
    """The whole report as text, as wide as it needs to be."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=160, force_terminal=False)
    console.print(report_table(report))
    for line in totals_lines(report.totals):
        console.print(line, highlight=False, markup=False)
    for line in finding_lines(report.findings):
        console.print(line, highlight=False, markup=False)
    for note in [*report.notes, *solver_notes(report.layers)]:
        console.print(f"note       {note}", highlight=False, markup=False)
    return buffer.getvalue().rstrip()
