"""Mse: the range whose codes are nearest to the values, by mean square.

    error(low, high) = sum_b count_b * (center_b - quantized(center_b))^2

over the bins b of the histogram, with the scale and the integer zero point that [low, high] gives: values beyond the
ends pay for clipping, values inside for rounding. Exact zeros cost nothing. The ends are searched on a geometric grid
of fractions of the full range, the two ends together, then twice around the best; the full range is on the grid, so
clipping is chosen only where it is measured to be better.

The best range for static uint8 activations on the kit's convolutional networks (output SQNR with int8 weights, `mse`
against `minmax`: MobileNetV1 25.6 and 23.3 dB, SqueezeNet 33.5 and 32.7 dB).

Source:
    The criterion of OCTAV (Sakr et al. 2022, arXiv:2206.06501) and of Banner et al. 2019 (arXiv:1810.05723). Differs:
    measured on the histogram and not derived from a fitted or smooth distribution, and the ends are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.observers.base import Observer
from narrowcast.observers.histogram import Bins, Histogram

_GRID = 24
# The grid ends at 0.85^23 = 1/42 of the full range.
_RATIO = 0.85
# Bins times ranges measured at once.
_WORK = 1 << 18


class Mse(Observer):
    """The range with the least mean square error of clipping and rounding.

    Args:
        bits: of the codes that will be used.
        symmetric: whether the range is -high..high and codes are -(2^(bits-1) - 1)..2^(bits-1) - 1.
    """

    def __init__(self, *, bits: int = 8, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        self._histogram = Histogram()

    def _take(self, values: Tensor) -> None:
        self._histogram.add(values)

    def _range(self) -> tuple[float, float]:
        if self.symmetric:
            high = _search(self._histogram.magnitude_bins(), 2 ** (self.bits - 1))[1]
            return -high, high
        return _search(self._histogram.bins(), 2**self.bits)


def _search(bins: Bins, levels: int) -> tuple[float, float]:
    grid = _RATIO ** torch.arange(_GRID, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    lows, highs = (grid if bound else one for bound in (bins.low, bins.high))
    best = (1.0, 1.0)
    for spacing in (0.04, 0.01, None):
        ranges = torch.cartesian_prod(lows, highs)
        errors = squared_error(bins, bins.low * ranges[:, 0], bins.high * ranges[:, 1], levels)
        best = tuple(ranges[int(errors.argmin())].tolist())
        if spacing is None:
            break
        around = 1.0 + spacing * torch.arange(-4, 5, dtype=torch.float64)
        lows, highs = (
            (ratio * around).clamp(max=1.0) if bound else one
            for ratio, bound in zip(best, (bins.low, bins.high), strict=True)
        )
    return bins.low * best[0], bins.high * best[1]


def squared_error(bins: Bins, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Summed squared error over the histogram of quantizing with each range.

    Args:
        bins: the histogram.
        low: [ranges] float64 <= 0.
        high: [ranges] float64 >= 0.
        levels: how many codes cover a range.

    Returns:
        [ranges] float64.
    """
    used = bins.counts > 0
    centers, counts = bins.centers[used], bins.counts[used]
    scale = (high - low) / (levels - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (-low / scale).round()
    errors = []
    for part in torch.arange(low.numel()).split(max(1, _WORK // max(1, centers.numel()))):
        step, zero = scale[part, None], zero_point[part, None]
        codes = (centers / step).round_().clamp_(-zero, levels - 1 - zero)
        errors.append(codes.mul_(step).sub_(centers).square_().mul_(counts).sum(1))
    return torch.cat(errors)
