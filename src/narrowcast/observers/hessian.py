"""The mean of x x^T over all input vectors: what the error of a layer's output is measured by."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite


class HessianObserver:
    """Streaming mean of x x^T; one matrix [in, in] of float64, whatever the amount of data."""

    def __init__(self) -> None:
        self.samples = 0
        self._batches = 0
        self._sum: Tensor | None = None

    def update(self, batch: Tensor) -> None:
        """Take in a batch.

        Args:
            batch: [..., in] float; may be empty.

        Raises:
            DataError: a value is not finite, or the number of channels has changed.
        """
        values = check_finite(batch, "HessianObserver", self._batches)
        rows = values.reshape(-1, values.shape[-1]).to(torch.float64)
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        if self._sum.shape[0] != rows.shape[1]:
            raise DataError(f"HessianObserver: batch {self._batches} has {rows.shape[1]} channels")
        self._sum += rows.t() @ rows
        self._batches += 1
        self.samples += rows.shape[0]

    def result(self) -> Tensor:
        """[in, in] float32.

        Raises:
            DataError: nothing was observed.
        """
        if self._sum is None or self.samples == 0:
            raise DataError("HessianObserver has seen no value; the layer did not run")
        return (self._sum / self.samples).to(torch.float32)
