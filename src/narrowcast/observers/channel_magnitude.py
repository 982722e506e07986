"""ChannelMagnitude: the mean square of every channel, which is the importance of the weights it multiplies.

Sums of floats depend on their order; these do not. Every square x * x is exact in float64. It is cut at fixed places
of its binary expansion into slices of 32 bits, each slice is a whole number times a power of two that depends on
nothing else, and whole numbers are added. So the result is the same, bit for bit, for every split of the data and
every order of batches, on every machine.

Source:
    Demmel & Nguyen 2015, "Parallel reproducible summation" (IEEE TC 64:2060). Differs: slices are cut toward zero at
    absolute positions, down to 2^-96.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite, in_threads

_SLICE_BITS = 32
# Slice i holds multiples of 2^(256 - 32 * (i + 1)). What lies below 2^-96, magnitudes under 4e-15, is cut off: beside
# it, a channel of any network is dead.
_TOP = 256
_SLICES = 11
# Squares summed at once: 2^16 slices below 2^32 are exact in float64.
_CHUNK = 1 << 16


class ChannelMagnitude:
    """Mean over all positions of the square of each channel.

    Args:
        axis: the channel dimension of the batches: -1 for features last, 1 for images [batch, channels, h, w].
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self._batches = 0
        self._positions = 0
        self._sums: Tensor | None = None  # [slices, channels] int64

    def update(self, batch: Tensor) -> None:
        """Take in a batch.

        Args:
            batch: [...] float with the channels at `axis`; may be empty.

        Raises:
            DataError: a value is not finite, there is no such dimension, or the number of channels has changed.
        """
        values = check_finite(batch, "ChannelMagnitude", self._batches)
        if not -values.dim() <= self.axis < values.dim():
            raise DataError(f"ChannelMagnitude: a batch of shape {tuple(values.shape)} has no dimension {self.axis}")
        axis = self.axis % values.dim()
        channels = values.shape[axis]
        if self._sums is None:
            self._sums = torch.zeros(_SLICES, channels, dtype=torch.int64)
        if self._sums.shape[1] != channels:
            raise DataError(
                f"ChannelMagnitude: batch {self._batches} has {channels} channels at dimension {self.axis} of shape "
                f"{tuple(values.shape)}, the batches before had {self._sums.shape[1]}"
            )
        self._batches += 1
        if values.numel() == 0:
            return
        self._positions += values.numel() // channels
        outer, inner = math.prod(values.shape[:axis]), math.prod(values.shape[axis + 1 :])
        view = values.reshape(outer, channels, inner)
        columns = max(1, _CHUNK // channels)
        rows = max(1, columns // inner)
        parts = [piece for part in view.split(rows) for piece in part.split(columns, dim=2)]
        for sums in in_threads(_slice_sums, parts):
            self._sums += sums

    def result(self) -> Tensor:
        """Mean square per channel [channels], float32.

        Raises:
            DataError: nothing was observed.
        """
        if self._sums is None or self._positions == 0:
            raise DataError(
                f"ChannelMagnitude has seen no value in {self._batches} batches; the layer did not run, or the "
                "calibration data is empty: give data that reaches it"
            )
        total = torch.zeros(self._sums.shape[1], dtype=torch.float64)
        for index in reversed(range(_SLICES)):
            total += self._sums[index].to(torch.float64) * 2.0 ** (_TOP - _SLICE_BITS * (index + 1))
        return (total / self._positions).to(torch.float32)


def _slice_sums(values: Tensor) -> Tensor:
    """The slices of the squares of [outer, channels, inner], summed per channel: [slices, channels] int64."""
    sums = torch.zeros(_SLICES, values.shape[1], dtype=torch.int64)
    rest = values.to(torch.float64).square_()
    largest = float(rest.max())
    if largest == 0.0:
        return sums
    for index in range(max(0, (_TOP - math.frexp(largest)[1]) // _SLICE_BITS), _SLICES):
        unit = 2.0 ** (_TOP - _SLICE_BITS * (index + 1))
        whole = (rest * (1.0 / unit)).trunc_()
        sums[index] = whole.sum(dim=(0, 2)).to(torch.int64)
        rest -= whole.mul_(unit)
        if not bool(rest.any()):
            break
    return sums
