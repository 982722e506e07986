"""Outlier channels: which ones calibration names, and what a weight solver sees without them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from narrowcast.methods import Seen
from narrowcast.observers import ChannelMagnitude
from narrowcast.recipe import InputRule


def choose_outliers(rule: InputRule, magnitude: ChannelMagnitude) -> Tensor:
    """The channels of largest mean square, ascending, [outliers] int64; of equal ones the first.

    Args:
        rule: says how many.
        magnitude: of the layer's input, which has run.
    """
    mean_square = magnitude.result()
    ranked = mean_square.argsort(descending=True, stable=True)
    return ranked[: rule.outlier_count(mean_square.numel())].sort().values


def without_outliers(weight: Tensor, seen: Seen | None, outliers: Tensor | None) -> tuple[Tensor, Seen | None]:
    """The weight and what was seen at its input where the outlier channels are 0, as they are in the integer product.

    Args:
        weight: [out, in].
        seen: what calibration saw.
        outliers: [outliers] int64; None changes nothing.
    """
    if outliers is None:
        return weight, seen
    weight = weight.index_fill(1, outliers, 0.0)
    if seen is None:
        return weight, None
    importance = None if seen.importance is None else seen.importance.index_fill(0, outliers, 0.0)
    hessian = None if seen.hessian is None else seen.hessian.index_fill(0, outliers, 0.0).index_fill(1, outliers, 0.0)
    inputs = None if seen.inputs is None else seen.inputs.index_fill(1, outliers, 0.0)
    drift = None if seen.drift is None else seen.drift.index_fill(0, outliers, 0.0).index_fill(1, outliers, 0.0)
    return weight, replace(seen, importance=importance, hessian=hessian, inputs=inputs, drift=drift)


def describe_outliers(outliers: Tensor, shown: int = 8) -> str:
    """The channels in words for the report."""
    named = ", ".join(str(int(index)) for index in outliers[:shown])
    more = f" and {outliers.numel() - shown} more" if outliers.numel() > shown else ""
    return f"channels {named}{more} in float16"
