"""The Markdown page of a low-bits run: what it measured, the targets, every cell, and what was not offered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks import low_bits_targets, results_io
from benchmarks.kit import kit_model
from benchmarks.peers_low_bits.table import PEERS

Row = dict[str, Any]
HEADER = ("model", "format", "tool", "method", "bits per weight", "float32", "score", "difference", "95 % interval")
HEADER += ("agreement % / cosine", "SQNR dB", "seconds", "peak MB above the model", "weights changed", "notes")
TARGETS = ("target", "best narrowcast recipe", "its number", "verdict")
DEFAULTS = ("model", "format", "best recipe", "its loss", "default's loss", "verdict")


def cells(row: Row) -> list[Any]:
    """The cells of one table row."""
    names = [row[key] for key in ("model", "format", "tool", "method")]
    if "failed" in row or "stopped" in row:
        words = f"failed: {row['failed']}" if "failed" in row else f"stopped after {row['stopped']:g} s"
        return [*names, words, *[None] * (len(HEADER) - 5)]
    fidelity = row.get("agreement", row.get("cosine"))
    low, high = row["interval"]
    return [
        *names,
        row.get("bits"),
        *(results_io.rounded(row[key], 3) for key in ("float32", "score", "difference")),
        f"{low:.3f} .. {high:.3f}",
        results_io.rounded(fidelity, 2 if "agreement" in row else 5),
        results_io.rounded(row["sqnr_db"], 2),
        results_io.rounded(row["seconds"], 1),
        row["peak_mb"],
        f"{row['changed']} of {row['matrices']}" if "changed" in row else None,
        "; ".join([*row.get("notes", []), *row.get("fell_back", []), *twins(row)]) or None,
    ]


def twins(row: Row) -> list[str]:
    """What other methods of the tool give the very same answers."""
    return [f"answers bit for bit as {', '.join(row['same_as'])}"] if row.get("same_as") else []


def with_twins(rows: list[Row]) -> list[Row]:
    """The rows with `same_as`: the tool's other methods with the same answers on the same model and format."""

    def place(row: Row) -> tuple[Any, ...]:
        return (*(row[key] for key in ("model", "format", "tool", "samples")), row.get("digest"))

    methods: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        methods.setdefault(place(row), []).append(row["method"])
    return [
        row | {"same_as": [name for name in methods[place(row)] if "digest" in row and name != row["method"]]}
        for row in rows
    ]


def not_offered(models: Iterable[str], formats: Iterable[str], tools: Iterable[str]) -> list[tuple[str, str, str]]:
    """Tool, kind of model and the formats that the tool has no method for."""
    lines = []
    for tool in (tool for tool in tools if tool in PEERS):
        for kind in dict.fromkeys(kit_model(name).kind for name in models):
            offers = [offer.formats for offer in PEERS[tool].methods.values() if kind in offer.kinds]
            lacking = [form for form in formats if not any(form in offered for offered in offers)]
            if lacking:
                lines.append((tool, kind, ", ".join(lacking)))
    return lines


def targets_section(rows: list[Row]) -> list[str]:
    """The targets of issue 4, computed from the rows."""
    verdicts = low_bits_targets.judged(rows)
    defaults = low_bits_targets.defaults(rows)
    section = ["## Targets"]
    if verdicts:
        lines = [[v["target"], v["recipe"], v["value"], v["verdict"]] for v in verdicts]
        section.append(results_io.table(TARGETS, lines))
    if defaults:
        section.append(
            "The default recipe within 10 % of the best recipe's loss, the drop from float32 where there is one. Where "
            "the best loss is within noise (its interval contains 0) the default's interval must contain 0 too, or "
            "overlap the best's."
        )
        lines = [[d[key] for key in ("model", "format", "recipe", "best", "default", "verdict")] for d in defaults]
        section.append(results_io.table(DEFAULTS, lines))
    return section


def when(rows: list[Row]) -> str:
    """Between which moments, and beside how much other work, the cells were measured."""
    dated = [row for row in rows if "date" in row]
    if not dated:
        return ""
    dates, loads = sorted(row["date"] for row in dated), sorted(row["load"] for row in dated)
    ours = Counter(row.get("commit", "not noted") for row in dated if row["tool"] == low_bits_targets.OURS)
    said = ", ".join(f"{count} of {name}" for name, count in ours.most_common())
    return (
        f"Cells measured {dates[0]} to {dates[-1]} at load averages {loads[0]} to {loads[-1]}: "
        f"above 1, seconds are those of a shared machine. narrowcast's cells by commit: {said}."
    )


def markdown(
    facts: dict[str, Any], document: dict[str, Any], description: str, *, models: list[str], formats: list[str]
) -> str:
    """The Markdown page of a run.

    Args:
        facts: result of `machine()`.
        document: with "rows", "skipped" and "versions" (tool -> versions).
        description: what the page measures, in one paragraph.
        models: kit models asked for.
        formats: formats asked for.
    """
    rows, versions = with_twins(document["rows"]), document["versions"]
    tools = [f"- {tool} ({version}): {PEERS[tool].differs}" for tool, version in versions.items() if tool in PEERS]
    section = targets_section(rows) if any(row["tool"] == low_bits_targets.OURS for row in rows) else []
    lacking = not_offered(models, formats, versions)
    return results_io.page(
        "Low bits",
        facts,
        [
            description,
            *([when(rows)] if when(rows) else []),
            *document["skipped"],
            *section,
            *(["## Other tools", "\n".join(tools)] if tools else []),
            "## Cells",
            results_io.table(HEADER, map(cells, rows)),
            *(
                ["## Not offered", results_io.table(("tool", "kind of model", "not offered"), lacking)]
                if lacking
                else []
            ),
        ],
    )
