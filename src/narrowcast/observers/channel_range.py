"""ChannelRange: the smallest and largest value of every channel, and how often each was met exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite

# A continuous quantity meets its extreme once. One that meets it this often has reached a wall: 0 after a ReLU, 6 after
# a ReLU6, white in an image.
_WALL_HITS = 8


class ChannelRange:
    """Smallest and largest value of every channel; channels are the last dimension of the batches.

    The answer is the same, bit for bit, however the data is split into batches and whatever their order.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._bounds: list[Tensor] = []  # low, high: [channels] float32
        self._hits: list[Tensor] = []  # how many values equal each, [channels] int64

    def update(self, batch: Tensor) -> None:
        """Take in a batch.

        Args:
            batch: [..., channels] float; may be empty.

        Raises:
            DataError: a value is not finite, or the number of channels has changed.
        """
        values = check_finite(batch, "ChannelRange", self._batches)
        self._batches += 1
        if values.numel() == 0:
            return
        rows = values.flatten(0, -2)
        bounds = [rows.amin(0), rows.amax(0)]
        hits = [(rows == bound).sum(0) for bound in bounds]
        if not self._bounds:
            self._bounds, self._hits = bounds, hits
            return
        if bounds[0].shape != self._bounds[0].shape:
            raise DataError(
                f"ChannelRange: batch {self._batches - 1} has {bounds[0].numel()} channels, the batches before had "
                f"{self._bounds[0].numel()}"
            )
        for side, outer in enumerate((torch.minimum, torch.maximum)):
            merged = outer(self._bounds[side], bounds[side])
            kept, new = self._hits[side] * (self._bounds[side] == merged), hits[side] * (bounds[side] == merged)
            self._bounds[side], self._hits[side] = merged, kept + new

    @property
    def seen(self) -> bool:
        """Whether any value was observed."""
        return bool(self._bounds)

    def result(self) -> tuple[Tensor, Tensor]:
        """(low, high), each [channels] float32.

        Raises:
            DataError: nothing was observed.
        """
        if not self._bounds:
            raise DataError(
                f"ChannelRange has seen no value in {self._batches} batches; the layer did not run, or the calibration "
                "data is empty: give data that reaches it"
            )
        return self._bounds[0], self._bounds[1]

    def walls(self) -> tuple[Tensor, Tensor]:
        """Whether low and high are bounds that no data passes, each [channels] bool: they were met many times."""
        self.result()
        return self._hits[0] >= _WALL_HITS, self._hits[1] >= _WALL_HITS
