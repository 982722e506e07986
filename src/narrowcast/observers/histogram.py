"""A histogram of a stream whose counts do not depend on how the stream is cut.

Bin k counts the values x with trunc(x / width) = k, for -8192 < k < 8192. The width is a power of two that follows
from the largest magnitude alone, so division is exact; when the range grows, the width doubles and bin k becomes
bin trunc(k / 2), and trunc(trunc(x / width) / 2) = trunc(x / (2 * width)): the counts are those that the final width
would have given from the start. Exact zeros are counted apart: they cost no error in any range, and after a ReLU
they would outweigh everything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.observers.base import in_threads

# Bins on each side of zero: at least 4096 of them are in use on the longer side.
_SIDE_BITS = 13
_SIDE = 1 << _SIDE_BITS
# Values counted at once; the temporaries stay in cache.
_CHUNK = 1 << 18
_SMALLEST_WIDTH_EXPONENT = -126


@dataclass(frozen=True)
class Bins:
    """The occupied stretch of a histogram, without the exact zeros.

    Args:
        edges: [bins + 1] float64, ascending; the outermost are the smallest and the largest value seen.
        counts: [bins] float64 with whole numbers.
        zeros: how many values were exactly 0.
    """

    edges: Tensor
    counts: Tensor
    zeros: int

    @property
    def centers(self) -> Tensor:
        """[bins] float64: the middle of every bin, for which its values stand."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    @property
    def low(self) -> float:
        """Smallest value seen, at most 0: every range contains 0."""
        return min(float(self.edges[0]), 0.0) if self.counts.numel() else 0.0

    @property
    def high(self) -> float:
        """Largest value seen, at least 0."""
        return max(float(self.edges[-1]), 0.0) if self.counts.numel() else 0.0


class Histogram:
    """Counts of a stream of values in 16383 bins; see the module's docstring."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2 * _SIDE, dtype=torch.int64)  # bin k is at k + _SIDE
        self._exponent: int | None = None  # width = 2 ** exponent
        self._zeros = 0
        self._low, self._high = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        """Count float32 values: finite, at least one."""
        low, high = (float(bound) for bound in values.aminmax())
        self._low, self._high = min(self._low, low), max(self._high, high)
        zeros = values.numel() - int(values.count_nonzero())
        self._zeros += zeros
        if zeros == values.numel():
            return
        self._widen(max(-low, high))
        assert self._exponent is not None
        per_width = 2.0**-self._exponent

        def count(part: Tensor) -> Tensor:
            index = (part * per_width).trunc_().add_(_SIDE).to(torch.int64)
            return torch.zeros_like(self._counts).scatter_add_(0, index, torch.ones_like(index))

        for counts in in_threads(count, values.reshape(-1).split(_CHUNK)):
            self._counts += counts
        self._counts[_SIDE] -= zeros

    def bins(self) -> Bins:
        """The occupied bins; at least one value seen."""
        return self._stretch(self._counts, self._low, self._high)

    def magnitude_bins(self) -> Bins:
        """The occupied bins of the absolute values; at least one value seen."""
        counts = torch.zeros_like(self._counts)
        counts[_SIDE:] = self._counts[_SIDE:]
        counts[_SIDE + 1 :] += self._counts[1:_SIDE].flip(0)
        smallest = max(self._low, -self._high, 0.0)
        return self._stretch(counts, smallest, max(-self._low, self._high))

    def _stretch(self, counts: Tensor, low: float, high: float) -> Bins:
        used = counts.nonzero().flatten()
        if self._exponent is None:
            return Bins(torch.zeros(1, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), self._zeros)
        first, last = int(used[0]), int(used[-1])
        index = torch.arange(first, last + 2, dtype=torch.float64) - _SIDE
        # bin k starts at k on the positive side, at k - 1 up to zero: the bin around zero is two wide
        edges = torch.where(index > 0, index, index - 1) * 2.0**self._exponent
        return Bins(edges.clamp(low, high), counts[first : last + 1].to(torch.float64), self._zeros)

    def _widen(self, magnitude: float) -> None:
        """Double the width until `magnitude` > 0 has a bin."""
        exponent = max(math.frexp(magnitude)[1] - _SIDE_BITS, _SMALLEST_WIDTH_EXPONENT)
        if self._exponent is None:
            self._exponent = exponent
        for _ in range(min(exponent - self._exponent, _SIDE_BITS)):
            self._halve()
        self._exponent = max(exponent, self._exponent)

    def _halve(self) -> None:
        """Merge bins 2k and 2k + 1 on the positive side, 2k and 2k - 1 on the negative side, into bin k."""
        index = torch.arange(2 * _SIDE) - _SIDE
        merged = torch.div(index, 2, rounding_mode="trunc") + _SIDE
        self._counts = torch.zeros_like(self._counts).scatter_add_(0, merged, self._counts)
