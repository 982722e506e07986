"""MinMax: the full range. Nothing is clipped, so one outlier costs every other value resolution."""

from __future__ import annotations

import math

from torch import Tensor

from narrowcast.observers.base import Observer


class MinMax(Observer):
    """The smallest and the largest value seen."""

    def __init__(self) -> None:
        super().__init__()
        self._low, self._high = math.inf, -math.inf

    def _take(self, values: Tensor) -> None:
        low, high = (float(bound) for bound in values.aminmax())
        self._low, self._high = min(self._low, low), max(self._high, high)

    def _range(self) -> tuple[float, float]:
        return self._low, self._high
