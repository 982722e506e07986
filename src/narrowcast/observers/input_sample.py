"""InputSample: a bounded number of a layer's input vectors, and the size of every channel.

Which vectors are kept depends on their position in the data alone (a hash of it), so the split into batches does not
matter and a long image row or story has no more than its share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio: consecutive positions are spread evenly


class InputSample:
    """Vectors and channel sizes of a layer's input, channels last.

    Args:
        limit: most vectors that are kept.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self._positions = 0
        self._batches = 0
        self._keys = torch.empty(0, dtype=torch.int64)
        self._rows: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def update(self, batch: Tensor) -> None:
        """Take in a batch [..., channels].

        Raises:
            DataError: a value is not finite, or the number of channels has changed.
        """
        values = check_finite(batch, "InputSample", self._batches)
        rows = values.reshape(-1, values.shape[-1]).float()
        if self._rows is not None and self._rows.shape[1] != rows.shape[1]:
            raise DataError(f"InputSample: {rows.shape[1]} channels, the batches before had {self._rows.shape[1]}")
        self._batches += 1
        if not rows.shape[0]:
            return
        self._measure(rows)
        keys = torch.arange(self._positions, self._positions + rows.shape[0]) * _MULTIPLIER
        self._positions += rows.shape[0]
        few = keys.topk(min(self.limit, keys.numel()), largest=False).indices
        kept = torch.cat([self._keys, keys[few]])
        joined = rows[few] if self._rows is None else torch.cat([self._rows, rows[few]])
        order = kept.argsort()[: self.limit]
        self._keys, self._rows = kept[order], joined[order].clone()

    def _measure(self, rows: Tensor) -> None:
        exact = rows.double()
        fresh = {"sum": exact.sum(0), "absolute": exact.abs().sum(0), "square": exact.square().sum(0)}
        bounds = {"low": rows.amin(0), "high": rows.amax(0)}
        if not self._sums:
            self._sums = fresh | bounds
            return
        for name, value in fresh.items():
            self._sums[name] = self._sums[name] + value
        self._sums["low"] = torch.minimum(self._sums["low"], bounds["low"])
        self._sums["high"] = torch.maximum(self._sums["high"], bounds["high"])

    @property
    def positions(self) -> int:
        """Vectors seen."""
        return self._positions

    def rows(self) -> Tensor:
        """The kept vectors, [n, channels] float32.

        Raises:
            DataError: nothing was observed.
        """
        if self._rows is None:
            raise DataError("InputSample has seen no value; the layer did not run, or the calibration data is empty")
        return self._rows

    def low(self) -> Tensor:
        """Smallest value of every channel, [channels] float32."""
        return self._sums["low"]

    def high(self) -> Tensor:
        """Largest value of every channel, [channels] float32."""
        return self._sums["high"]

    def largest(self) -> Tensor:
        """Largest absolute value of every channel, [channels] float32."""
        return torch.maximum(self._sums["low"].abs(), self._sums["high"].abs())

    def magnitude(self) -> Tensor:
        """Mean absolute value of every channel, [channels] float64."""
        return self._sums["absolute"] / max(self._positions, 1)

    def mean_square(self) -> Tensor:
        """Mean square of every channel, [channels] float64."""
        return self._sums["square"] / max(self._positions, 1)

    def mean(self) -> Tensor:
        """Mean of every channel, [channels] float64."""
        return self._sums["sum"] / max(self._positions, 1)

    def deviation(self) -> Tensor:
        """Standard deviation of every channel, [channels] float64."""
        return (self.mean_square() - self.mean().square()).clamp(min=0).sqrt()
