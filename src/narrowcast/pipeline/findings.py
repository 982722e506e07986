"""From counts to findings: every threshold of the calibration doctor, with its reason. Reads no data, runs no model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from narrowcast.data import DataStatistics
from narrowcast.data.statistics import ValueStatistics
from narrowcast.methods import make_method
from narrowcast.models.entrance import Entrance
from narrowcast.planning import LayerPlan, Plan
from narrowcast.report import Finding

# Fewer input vectors than channels leave the Hessian singular: what is not spanned is rounded as if it did not matter.
# A tenth of them spans next to nothing.
_SEVERELY_SHORT = 0.1
# A range is the extreme of what was seen; of 32 vectors' extremes one in 33 new ones lies outside.
_VECTORS_FOR_RANGE = 32
# Below this a mean square per channel is off by a third or more (sqrt(2 / 16)).
_VECTORS_FOR_MEAN = 16
_REPEATED = (0.1, 0.5)  # share of rows: (warning, severe)
_PADDED = (0.3, 0.9)
_CONSTANT = (0.05, 0.5)
# Images of the training distribution stay within a factor of 1.15 on the models tried; division by 255 without
# normalization, or the reverse, is off by a factor of 4 to 5, missing division by 55 or more.
_SPREAD = (2.5, 8.0)
_SHIFT = (1.5, 8.0)
# Neighbouring pixels of photographs correlate by 0.8 to 0.99.
_NOISE = 0.1
_PIXELS_FOR_NOISE = 4096
# Equal pairs among ids drawn evenly: 1 (+- its deviation). The kit's texts give 6, 36 and 508.
_EVEN = 1.25
_SMALLEST_VOCABULARY = 256
_LARGEST_NORMALIZED = 16.0
# Share of a layer's channels; trained networks have dead ones, up to nine in ten, but their weights have decayed, too.
_UNSEEN_CHANNELS = 0.25
_SHOWN = 3


def judge_length(plan: Plan, positions: Mapping[str, float]) -> list[Finding]:
    """Layers that see fewer input vectors than their method or their static range needs.

    Args:
        plan: what will be done.
        positions: path of a module -> input vectors that it will see.
    """
    short: dict[str, list[tuple[float, str, float, int]]] = {}
    for row in plan.layers:
        seen = sum(positions.get(site.path, 0.0) for site in row.layer.sites)
        if row.weight is None or not seen:
            continue
        reason, needed = _needed(row)
        if seen < needed:
            short.setdefault(reason, []).append((seen / needed, row.layer.name, seen, needed))
    return [_short(reason, rows) for reason, rows in short.items()]


def _needed(row: LayerPlan) -> tuple[str, int]:
    if row.weight is not None and not row.weight.format.is_cast and make_method(row.method).needs:
        name = next(iter(row.method))
        if row.chosen:
            return (
                f"the default, {name}, needs one per input of the layer, which is rounded to nearest",
                row.layer.shape[1],
            )
        return f"method {name!r} needs as many as the layer has inputs", row.layer.shape[1]
    if row.input is not None and row.input.observer:
        return "a static range needs a few dozen", _VECTORS_FOR_RANGE
    return "mean squares need at least that many to mean something", _VECTORS_FOR_MEAN


def _short(reason: str, rows: list[tuple[float, str, float, int]]) -> Finding:
    share, name, seen, needed = min(rows)
    severe = "needs as many" in reason and share < _SEVERELY_SHORT
    layers = f"{len(rows)} layers see" if len(rows) > 1 else "1 layer sees"
    return Finding(
        "severe" if severe else "warning",
        "length",
        "calibration data",
        f"{layers} too few input vectors, {name!r} about {seen:.0f} of {needed}: {reason}",
        f"give about {math.ceil(1 / share)} times as much data",
        {"layers": len(rows), "vectors": round(seen), "needed": needed},
    )


def judge_tokens(statistics: DataStatistics) -> list[Finding]:
    """Repeated rows, padding, ids that no text has."""
    found = []
    hashes = statistics.hashes
    share = hashes.repeated / hashes.rows if hashes.rows else 0.0
    if hashes.repeated > 1 and (severity := _over(share, _REPEATED)):
        found.append(
            Finding(
                severity,
                "duplicates",
                "calibration data",
                f"{hashes.repeated} of {hashes.rows} rows repeat an earlier one ({share:.0%})",
                "remove them: they add weight, not knowledge",
                {"repeated": hashes.repeated, "rows": hashes.rows},
            )
        )
    for name, tokens in statistics.tokens.items():
        padded = tokens.padding / max(tokens.padding + tokens.tokens, 1)
        if severity := _over(padded, _PADDED):
            found.append(
                Finding(
                    severity,
                    "padding",
                    f"input {name!r}",
                    f"{padded:.0%} of the tokens are padding, which is calibrated on like text",
                    "batch rows of equal length, one at a time, or cut and join texts to full length",
                    {"padding": tokens.padding, "tokens": tokens.tokens},
                )
            )
        even = tokens.evenness()
        size = 0 if tokens.counts is None else tokens.counts.numel()
        if even is not None and size >= _SMALLEST_VOCABULARY and even[1] < 0.25 and even[0] < _EVEN + even[1]:
            found.append(
                Finding(
                    "warning",
                    "noise",
                    f"input {name!r}",
                    f"its ids look drawn at random: two are equal {even[0]:.2f} times as often as by chance",
                    "calibrate on text like that which the model will read",
                    {"evenness": even[0], "vocabulary": size},
                )
            )
    return found


def judge_values(
    statistics: DataStatistics, entrance: Entrance, difference: tuple[float, float] | None
) -> list[Finding]:
    """Constant rows, pixels that are noise, a range that the model was not trained on.

    Args:
        statistics: of the data.
        entrance: of the model.
        difference: spread and shift at the first BatchNorm, see `Doctor`; None where there is none.
    """
    found = []
    for name, values in statistics.values.items():
        share = values.constant / values.rows if values.rows else 0.0
        if values.constant > 1 and (severity := _over(share, _CONSTANT)):
            found.append(
                Finding(
                    severity,
                    "constant",
                    f"input {name!r}",
                    f"{values.constant} of {values.rows} rows hold one value only ({share:.0%})",
                    "remove them: blank images, or files that were not read",
                    {"constant": values.constant, "rows": values.rows},
                )
            )
        correlation = values.correlation()
        if correlation is not None and values.pixels >= _PIXELS_FOR_NOISE and abs(correlation) < _NOISE:
            found.append(
                Finding(
                    "warning",
                    "noise",
                    f"input {name!r}",
                    f"neighbouring pixels are unrelated (correlation {correlation:.2f}), as in random numbers",
                    "calibrate on images like those which the model will see",
                    {"correlation": correlation},
                )
            )
        found += _raw_pixels(name, values, entrance) if difference is None else []
    return found + (_against_norm(statistics, entrance, *difference) if difference is not None else [])


def _raw_pixels(name: str, values: ValueStatistics, entrance: Entrance) -> list[Finding]:
    """8-bit pixels in a model that says nothing of what it was trained on, where they reach a layer as they are."""
    is_raw = values.whole and values.low >= 0 and _LARGEST_NORMALIZED < values.high <= 255 and values.pixels > 0
    if not is_raw or entrance.largest <= _LARGEST_NORMALIZED:
        return []
    return [
        Finding(
            "warning",
            "range",
            f"input {name!r}",
            f"its pixels are whole numbers from {values.low:.0f} to {values.high:.0f}, and so they reach layer "
            f"{entrance.first!r}",
            "divide by 255 and normalize as in training, unless the model was trained on such values",
            {"low": values.low, "high": values.high},
        )
    ]


def _against_norm(statistics: DataStatistics, entrance: Entrance, spread: float, shift: float) -> list[Finding]:
    factor = max(spread, 1 / max(spread, 1e-12))
    severities = [_over(factor, _SPREAD), _over(shift, _SHIFT)]
    if not any(severities):
        return []
    values = next(iter(statistics.values.values()), ValueStatistics())
    remedy = "normalize as in training"
    if values.whole and values.low >= 0 and values.high > _LARGEST_NORMALIZED:
        remedy = "the values are 8-bit pixels: divide by 255 and normalize as in training"
    elif values.low >= 0 and values.high <= 1:
        remedy = "the values are from 0 to 1: subtract the mean and divide by the deviation as in training"
    return [
        Finding(
            "severe" if "severe" in severities else "warning",
            "range",
            f"layer {entrance.norm!r}",
            f"what reaches this BatchNorm is spread {spread:.2g} times as wide as in training, and its mean is "
            f"{shift:.2g} deviations off",
            remedy,
            {"spread": spread, "shift": shift},
        )
    ]


@dataclass(frozen=True)
class Dead:
    """Input channels of a layer that were zero on all the data.

    Args:
        channels: how many.
        of: channels of the layer.
        used: those whose weights are as large as other channels', so that the model seems to have a use for them.
    """

    channels: int
    of: int
    used: int


def judge_reach(calls: Mapping[str, int], dead: Mapping[str, Dead]) -> list[Finding]:
    """Modules that never ran, and input channels that were always zero.

    Args:
        calls: path of a module to be quantized -> how often it ran.
        dead: path of one that ran -> its channels that were always zero.
    """
    found = []
    idle = [path for path, count in calls.items() if not count]
    if idle and len(idle) < len(calls):
        alike = {re.sub(r"\d+", "*", path) for path in idle}
        busy = {re.sub(r"\d+", "*", path) for path, count in calls.items() if count}
        kind = "experts or branches" if alike & busy else "modules"
        found.append(
            Finding(
                "warning",
                "unseen",
                "calibration data",
                f"{len(idle)} {kind} of {len(calls)} never ran: {_named(idle)}",
                "give data that reaches them, or keep them by a rule",
                {"modules": len(idle), "of": len(calls)},
            )
        )
    silent = {path: layer for path, layer in dead.items() if layer.channels}
    return found + ([_dead(silent)] if silent else [])


def _dead(silent: Mapping[str, Dead]) -> Finding:
    missing = {path: layer for path, layer in silent.items() if layer.used / layer.of > _UNSEEN_CHANNELS}
    path, worst = max((missing or silent).items(), key=lambda entry: entry[1].channels / entry[1].of)
    total = sum(layer.channels for layer in silent.values())
    use = "and the model's weights for them are as large as for others" if missing else "which is rarely a loss"
    return Finding(
        "warning" if missing else "note",
        "unseen",
        "calibration data",
        f"{total} input channels of {len(silent)} layers were always zero, most in {path!r}: {worst.channels} of "
        f"{worst.of}, {use}",
        "give more varied data" if missing else "",
        {"channels": total, "layers": len(silent), "used": sum(layer.used for layer in silent.values())},
    )


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(repr(path) for path in paths[:_SHOWN]) + more


def _over(value: float, thresholds: tuple[float, float]) -> Literal["", "warning", "severe"]:
    warning, severe = thresholds
    return "severe" if value >= severe else "warning" if value >= warning else ""
