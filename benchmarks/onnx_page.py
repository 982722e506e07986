"""The Markdown page of `python -m benchmarks.onnx`: targets, scores, kernels, latency."""

from __future__ import annotations

from typing import Any

from benchmarks import onnx_targets, results_io
from benchmarks.onnx_tools import FLOAT32, ORT
from benchmarks.timing import Timing

Row = dict[str, Any]
SCORES = ("model", "tool", "method", "score", "difference", "95 % interval", "agreement % / cosine", "SQNR dB", "KB",
          "integer kernels", "seconds", "commit")  # fmt: skip
LATENCY = ("model", "shape", "threads", "load", "tool and method", "median ms", "fastest ms", "times float32",
           "times ORT static", "commit")  # fmt: skip


def markdown(facts: dict[str, Any], document: dict[str, Any], description: str) -> str:
    """The page of a run, complete or not."""
    scores, timings = document["scores"], document["timings"]
    found = onnx_targets.judged(scores, timings)
    missed = sum(row["verdict"] == onnx_targets.MISSED for row in found)
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    sections = [
        f"{description}\n\nVersions of the interpreter that times: {versions}.",
        f"## Targets\n\n{len(found) - missed} of {len(found)} met. A ratio of times says how many times faster "
        f"narrowcast is; down to {1.0 - onnx_targets.NOISE:.2f} counts as no slower.",
        results_io.table(("model", "target", "number", "verdict"), [tuple(row.values()) for row in found]),
        "## Scores\n\nIn the runtime that runs the file; all but OpenVINO's in ONNX Runtime. Integer kernels: products "
        "with a weight that multiply integers in the graph that ONNX Runtime optimizes the file to, of all such.",
        results_io.table(SCORES, map(_score, scores)),
        "## Products that stay float\n\nIn narrowcast's static-int8 and dynamic-int8 files and those of other tools.",
        results_io.table(("model", "tool", "method", "count", "kernel", "reason"), _floats(scores)),
        "## Latency\n\nMedian over the rounds of the median of a burst; ratios above 1 are faster. The load counts "
        "other work on the machine: a measurement beside it is worth less.",
        results_io.table(LATENCY, [cells for row in timings for cells in _latency(row)]),
    ]
    notes = [*document["skipped"], *_skipped(timings)]
    if notes:
        sections.append("## Left out\n\n" + "\n".join(f"- {note}" for note in notes))
    return results_io.page("ONNX files", facts, sections)


def _score(row: Row) -> list[Any]:
    names = [row["model"], row["tool"], row["method"]]
    if "score" not in row:
        return [*names, _why_not(row), *[None] * (len(SCORES) - 5), _commit(row)]
    fidelity, low, high = row.get("agreement", row.get("cosine")), *row["interval"]
    return [
        *names,
        *(results_io.rounded(row[key], 3) for key in ("score", "difference")),
        f"{low:.3f} .. {high:.3f}",
        results_io.rounded(fidelity, 2 if "agreement" in row else 5),
        results_io.rounded(row["sqnr_db"], 2),
        round(row["bytes"] / 1000),
        f"{row['integer']} of {row['products']}" if "products" in row else None,
        row["seconds"],
        _commit(row),
    ]


def _why_not(row: Row) -> str:
    return f"failed: {row['failed']}" if "failed" in row else f"stopped after {row['stopped']:g} s"


def _commit(row: Row) -> str:
    """Enough of the commit to find it; with a plus where the source had changes."""
    words = row.get("commit", "")
    return words[:8] + ("+" if words.endswith("+changes") else "")


def _floats(scores: list[Row]) -> list[tuple[Any, ...]]:
    return [
        (row["model"], row["tool"], row["method"], found["count"], found["kernel"], found["reason"])
        for row in scores
        if "int8" in row["method"] or row["method"].startswith(("static", "dynamic"))
        for found in row.get("floats", [])
        if not row["method"].startswith("weight")
    ]


def _latency(row: Row) -> list[list[Any]]:
    if "milliseconds" not in row:
        return [[row["model"], row["format"], row["method"], None, _why_not(row), *[None] * 4, _commit(row)]]
    times = {name: Timing(tuple(value["rounds"]), value["best"]) for name, value in row["milliseconds"].items()}
    base, static = times.get(f"{ORT} {FLOAT32}"), times.get(f"{ORT} static U8S8")
    shape = row["format"].removeprefix("latency ")
    return [
        [
            *(row["model"], shape, row["method"].split()[0], row["load_average"], name),
            *(f"{value:.3g}" for value in (timing.median, timing.fastest)),
            *(None if other is None else f"{timing.ratio_to(other):.2f}" for other in (base, static)),
            _commit(row),
        ]
        for name, timing in times.items()
    ]


def _skipped(timings: list[Row]) -> list[str]:
    reasons = [f"{row['model']}, {name}: {why}" for row in timings for name, why in row.get("skipped", {}).items()]
    return list(dict.fromkeys(reasons))
