"""Percentile: the range without the last fraction of a percent of values at each end.

percentile(99.99) takes the 99.99th percentile as the high end and the 0.01st as the low end, of all values, zeros
included. Within a bin of the histogram the values count as evenly spread, so an end is within one bin (at most
1/2048 of the largest magnitude) of a value whose rank is exact.

Source:
    McKinstry et al. 2018, arXiv:1809.04191, section 3 (99.99 % for activations).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from narrowcast.errors import RecipeError
from narrowcast.observers.base import Observer
from narrowcast.observers.histogram import Bins, Histogram


class Percentile(Observer):
    """The range that leaves out 100 - percent of the values at each end.

    Args:
        percent: 50 < percent <= 100; 100 is the full range.

    Raises:
        RecipeError: percent is outside of that.
    """

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        if not 50.0 < percent <= 100.0:
            raise RecipeError(f"percentile({percent:g}): the percentage must be above 50 and at most 100, like 99.99")
        self.percent = percent
        self._histogram = Histogram()

    def _take(self, values: Tensor) -> None:
        self._histogram.add(values)

    def _range(self) -> tuple[float, float]:
        points, below = _cumulative(self._histogram.bins())
        total = float(below[-1])
        outside = total * (100.0 - self.percent) / 100.0
        low, high = np.interp([outside, total - outside], below.numpy(), points.numpy()).tolist()
        return low, max(low, high)


def _cumulative(bins: Bins) -> tuple[Tensor, Tensor]:
    """Points [n], ascending, and how many values lie below each [n]; linear in between, and a step at 0."""
    below = torch.cat([bins.counts.new_zeros(1), bins.counts.cumsum(0)])
    if bins.zeros == 0:
        return bins.edges, below
    at = int(torch.searchsorted(bins.edges, 0.0))  # edges[at - 1] < 0 <= edges[at]
    if at == 0 or at == bins.edges.numel():
        under = float(below[0 if at == 0 else -1])
    else:
        left, right = float(bins.edges[at - 1]), float(bins.edges[at])
        under = float(below[at - 1]) + float(below[at] - below[at - 1]) * (0.0 - left) / (right - left)
    points = torch.cat([bins.edges[:at], bins.edges.new_zeros(2), bins.edges[at:]])
    step = below.new_tensor([under, under + bins.zeros])
    return points, torch.cat([below[:at], step, below[at:] + bins.zeros])
