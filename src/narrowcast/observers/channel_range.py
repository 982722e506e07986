"""ChannelRange: the smallest and largest value of every channel."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite


class ChannelRange:
    """Smallest and largest value of every channel; channels are the last dimension of the batches.

    The answer is the same, bit for bit, however the data is split into batches and whatever their order.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._low: Tensor | None = None
        self._high: Tensor | None = None

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
        rows = values.reshape(-1, values.shape[-1]) if values.is_contiguous() else values.flatten(0, -2)
        low, high = rows.amin(0), rows.amax(0)
        if self._low is None or self._high is None:
            self._low, self._high = low, high
        elif low.shape != self._low.shape:
            raise DataError(
                f"ChannelRange: batch {self._batches - 1} has {low.numel()} channels, the batches before had "
                f"{self._low.numel()}"
            )
        else:
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)

    def result(self) -> tuple[Tensor, Tensor]:
        """(low, high), each [channels] float32.

        Raises:
            DataError: nothing was observed.
        """
        if self._low is None or self._high is None:
            raise DataError(
                f"ChannelRange has seen no value in {self._batches} batches; the layer did not run, or the calibration "
                "data is empty: give data that reaches it"
            )
        return self._low, self._high
