"""Results of several runs of `python -m benchmarks.onnx` as one document, each row with its commit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.onnx_cases import CASES, case
from benchmarks.onnx_tools import FLOAT32, ORT, TOOLS

Row = dict[str, Any]
# What every timed process has, so that ratios are between files of one process.
ANCHORS = (f"{ORT} {FLOAT32}", f"{ORT} static U8S8", f"{ORT} dynamic")
# Of notes that are written anew for the whole.
_RENEWED = ("not measured yet and left out", ", not measured: ", "Rows are from runs at the commits")
SCORE, TIMING = ("model", "tool", "method"), ("model", "format", "method")


def joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of several, which may share rows; rows without a date are as old as their place in the list.

    A later row of a cell replaces an earlier one, unless it was stopped and the earlier one was not. A later timing
    takes its files out of an earlier one of the same model, shape and threads; files that it has not stay there, with
    the anchors of their own process.
    """
    last = documents[-1]
    found: dict[str, Any] = {"machine": last["machine"], "versions": last["versions"], "scores": [], "timings": []}
    for row in _by_date(documents, "scores"):
        found["scores"] = _newer(found["scores"], row)
    for row in _by_date(documents, "timings"):
        found["timings"] = _retimed(found["timings"], row)
    models, tools = list(CASES), [tool.name for tool in TOOLS]
    found["scores"].sort(key=lambda row: (models.index(row["model"]), tools.index(f"{row['tool']} {row['method']}")))
    found["timings"].sort(key=lambda row: (models.index(row["model"]), row["format"], row["method"]))
    commits = dict.fromkeys(row["commit"] for part in ("scores", "timings") for row in found[part])
    notes = [note for note in last["skipped"] if not any(words in note for words in _RENEWED)]
    found["skipped"] = [*notes, *missing(found["scores"]), f"Rows are from runs at the commits {', '.join(commits)}."]
    return found


def missing(scores: list[Row]) -> list[str]:
    """The files of each model that have no row, one line per model."""
    measured = {(row["model"], f"{row['tool']} {row['method']}") for row in scores}
    lines = []
    for name in CASES:
        kind = case(name).kind
        left = [tool.name for tool in TOOLS if kind in tool.kinds and (name, tool.name) not in measured]
        lines += [f"{name}, not measured: {', '.join(left)}."] if left else []
    return lines


def _by_date(documents: list[dict[str, Any]], part: str) -> list[Row]:
    rows = [{"commit": document["machine"]["commit"]} | row for document in documents for row in document[part]]
    return sorted(rows, key=lambda row: row.get("date", ""))


def _same(row: Row, other: Row, keys: tuple[str, ...]) -> bool:
    return all(row[key] == other[key] for key in keys)


def _newer(earlier: list[Row], row: Row) -> list[Row]:
    if "stopped" in row and any("score" in old for old in earlier if _same(row, old, SCORE)):
        return earlier
    return [*(old for old in earlier if not _same(row, old, SCORE)), row]


def _retimed(earlier: list[Row], row: Row) -> list[Row]:
    alike = [old for old in earlier if _same(row, old, TIMING)]
    if "milliseconds" not in row and any("milliseconds" in old for old in alike):
        return earlier
    others = [old for old in earlier if not _same(row, old, TIMING)]
    return [*others, *(left for old in alike for left in _left_of(old, set(row.get("milliseconds", {})))), row]


def _left_of(old: Row, again: set[str]) -> Iterator[Row]:
    """An earlier timing without the files that are timed again; nothing where only anchors would be left."""
    times = old.get("milliseconds", {})
    if set(times) - again - set(ANCHORS):
        left = {name: value for name, value in times.items() if name in ANCHORS or name not in again}
        yield old | {"milliseconds": left}
