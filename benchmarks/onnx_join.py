"""Results of several runs of `python -m benchmarks.onnx` as one document, each row with its commit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.onnx_cases import CASES, case
from benchmarks.onnx_tools import FLOAT32, ORT, TOOLS

Row = dict[str, Any]
# What every timed process has, so that ratios are between files of one process.
ANCHORS = (f"{ORT} {FLOAT32}", f"{ORT} static U8S8", f"{ORT} dynamic")
SCORE, TIMING = ("model", "tool", "method"), ("model", "format", "method")


def joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of several, oldest first.

    A later row of a cell replaces an earlier one, unless it was stopped and the earlier one was not. A later timing
    takes its files out of an earlier one of the same model, shape and threads; files that it has not stay there, with
    the anchors of their own process.
    """
    last = documents[-1]
    found: dict[str, Any] = {"machine": last["machine"], "versions": last["versions"], "skipped": []}
    for document in documents:
        commit = {"commit": document["machine"]["commit"]}
        for part in ("scores", "timings"):
            document = document | {part: [commit | row for row in document[part]]}
        found["scores"] = _newer(found.get("scores", []), document["scores"])
        found["timings"] = _retimed(found.get("timings", []), document["timings"])
    models, tools = list(CASES), [tool.name for tool in TOOLS]
    found["scores"].sort(key=lambda row: (models.index(row["model"]), tools.index(f"{row['tool']} {row['method']}")))
    found["timings"].sort(key=lambda row: (models.index(row["model"]), row["format"], row["method"]))
    commits = dict.fromkeys(row["commit"] for part in ("scores", "timings") for row in found[part])
    notes = [note for note in last["skipped"] if not note.endswith("not measured yet and left out.")]
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


def _newer(earlier: list[Row], later: list[Row]) -> list[Row]:
    found = {tuple(row[key] for key in SCORE): row for row in earlier}
    for row in later:
        place = tuple(row[key] for key in SCORE)
        if "stopped" not in row or "score" not in found.get(place, {}):
            found[place] = row
    return list(found.values())


def _retimed(earlier: list[Row], later: list[Row]) -> list[Row]:
    return [*(row for old in earlier for row in _left_of(old, later)),
            *(row for row in later if "milliseconds" in row or not _timed(row, earlier))]  # fmt: skip


def _timed(row: Row, earlier: list[Row]) -> bool:
    return any(_same(row, old) and "milliseconds" in old for old in earlier)


def _same(row: Row, other: Row) -> bool:
    return all(row[key] == other[key] for key in TIMING)


def _left_of(old: Row, later: list[Row]) -> Iterator[Row]:
    """An earlier timing without the files that a later one has; nothing where only anchors would be left."""
    again = {name for row in later if _same(row, old) for name in row.get("milliseconds", {})}
    if not again:
        if "milliseconds" in old or not any(_same(row, old) for row in later):
            yield old
        return
    times = old.get("milliseconds", {})
    if set(times) - again - set(ANCHORS):
        yield old | {"milliseconds": {name: value for name, value in times.items()
                                      if name in ANCHORS or name not in again}}  # fmt: skip
