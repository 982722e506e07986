"""What issue 6 asks of the ONNX table, judged from its rows: accuracy, latency, kernels; bounds of earlier issues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import targets
from benchmarks.onnx_tools import FLOAT32, NARROWCAST, NNCF, OPENVINO, ORT, PRESETS
from benchmarks.timing import Timing

Row = dict[str, Any]
# narrowcast's preset -> the ways of ONNX Runtime's own quantizer that it must not be worse than.
RIVALS = {"static-int8": ("static U8S8", "static S8S8"), "dynamic-int8": ("dynamic",)}
INT8 = (
    *(f"{ORT} {way}" for ways in RIVALS.values() for way in ways),
    f"{NNCF} int8 in ONNX Runtime",
    f"{OPENVINO} int8",
    *(f"{NARROWCAST} {preset}" for preset in RIVALS),
)
# Two runs of the very same file part by so much in a run of 7 rounds on a shared machine.
NOISE = 0.03
MET, MISSED, UNKNOWN = "met", "**missed**", "not measured"


def judged(scores: list[Row], timings: list[Row]) -> list[Row]:
    """Every target with its number and verdict, model by model."""
    names = list(dict.fromkeys(row["model"] for row in scores))
    return [found for name in names for found in _of_model(name, scores, timings)]


def _of_model(name: str, scores: list[Row], timings: list[Row]) -> Iterator[Row]:
    rows = {f"{row['tool']} {row['method']}": row for row in scores if row["model"] == name and "score" in row}
    for preset, ways in RIVALS.items():
        mine = rows.get(f"{NARROWCAST} {preset}")
        theirs = [rows[f"{ORT} {way}"] for way in ways if f"{ORT} {way}" in rows]
        if mine is not None:
            yield from _accuracy(name, preset, mine, theirs)
            yield _row(name, f"{preset}: every product that it asks for is an integer kernel",
                       f"{mine['integer']} of {mine['products']}", mine["integer"] == mine["products"])  # fmt: skip
    for preset in PRESETS:
        if f"{NARROWCAST} {preset}" in rows:
            yield from _bounds(name, preset, rows[f"{NARROWCAST} {preset}"])
    places: dict[tuple[str, str], list[Row]] = {}
    for timing in (row for row in timings if row["model"] == name and "milliseconds" in row):
        places.setdefault((timing["format"], timing["method"]), []).append(timing)
    for (shape, threads), found in places.items():
        yield from _latency(name, f"{shape.removeprefix('latency ')}, {threads}", found)


def _accuracy(name: str, preset: str, mine: Row, theirs: list[Row]) -> Iterator[Row]:
    better = max if mine["score"] >= 0 and not _lower_is_better(name) else min
    for key, digits in (("score", 3), ("sqnr_db", 2)):
        best = (better if key == "score" else max)((row[key] for row in theirs), default=None)
        if best is None:
            continue
        ahead = mine[key] <= best if key == "score" and _lower_is_better(name) else mine[key] >= best
        words = "score" if key == "score" else "SQNR"
        yield _row(name, f"{preset}: {words} no worse than ONNX Runtime's quantizer",
                   f"{mine[key]:.{digits}f}, {best:.{digits}f}", ahead)  # fmt: skip


def _lower_is_better(name: str) -> bool:
    from benchmarks.onnx_cases import case

    return not case(name).higher_is_better


def _bounds(name: str, preset: str, mine: Row) -> Iterator[Row]:
    sign = -1.0 if _lower_is_better(name) else 1.0
    row = mine | {"drop": -sign * mine["difference"], "perplexity_ratio": mine["score"] / mine["float32"]}
    variant = preset if preset == "static-int8" else f"{preset}+data"  # every file of the table is calibrated
    for verdict in targets.judge([t for t in targets.ACCURACY if t.quantity in row], name, variant, row):
        yield _row(name, f"{preset}: {verdict['target']}, as for PyTorch", f"{verdict['value']:.4g}", verdict["met"])


def _latency(name: str, place: str, timings: list[Row]) -> Iterator[Row]:
    """Of one shape and number of threads: ratios are between files of one process, of which there may be several."""
    ratios: dict[str, float] = {}
    for timing in timings:
        times = {key: Timing(tuple(value["rounds"]), value["best"]) for key, value in timing["milliseconds"].items()}
        base = times.get(f"{ORT} {FLOAT32}")
        ratios |= {key: times[key].ratio_to(base) for key in INT8 if base is not None and key in times}
        yield from _rivals(name, place, times)
    ours = max((ratio for key, ratio in ratios.items() if key.startswith(NARROWCAST)), default=None)
    if ours is not None:
        fastest = max(ratios, key=lambda key: ratios[key])
        yield _row(name, f"{place}: faster than float32 if any int8 tool is",
                   f"{ours:.2f}x; fastest {fastest} {ratios[fastest]:.2f}x",
                   ours > 1.0 or ratios[fastest] <= 1.0)  # fmt: skip


def _rivals(name: str, place: str, times: dict[str, Timing]) -> Iterator[Row]:
    for preset, ways in RIVALS.items():
        mine = times.get(f"{NARROWCAST} {preset}")
        rivals = [times[f"{ORT} {way}"] for way in ways if f"{ORT} {way}" in times]
        if mine is None or not rivals:
            continue
        ratio = min(mine.ratio_to(rival) for rival in rivals)
        best = min(rival.fastest / mine.fastest for rival in rivals)
        yield _row(name, f"{place}: {preset} no slower than ONNX Runtime's quantizer",
                   f"{ratio:.2f}x, the fastest calls {best:.2f}x", ratio >= 1.0 - NOISE)  # fmt: skip


def _row(name: str, target: str, number: str, met: object) -> Row:
    return {"model": name, "target": target, "number": number, "verdict": MET if met else MISSED}
