"""The mean of x x^T for every group of a grouped convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite


class GroupedHessian:
    """Streaming mean of x x^T per group; [groups, columns, columns] of float64, whatever the amount of data."""

    def __init__(self) -> None:
        self.samples = 0
        self._batches = 0
        self._sum: Tensor | None = None

    def update(self, batch: Tensor) -> None:
        """Take in a batch.

        Args:
            batch: [groups, vectors, columns] float.

        Raises:
            DataError: a value is not finite.
        """
        rows = check_finite(batch, "GroupedHessian", self._batches).to(torch.float64)
        self._batches += 1
        self.samples += rows.shape[1]
        product = rows.transpose(1, 2) @ rows
        self._sum = product if self._sum is None else self._sum + product

    def result(self) -> Tensor:
        """[groups, columns, columns] float32.

        Raises:
            DataError: nothing was observed.
        """
        if self._sum is None or self.samples == 0:
            raise DataError("GroupedHessian has seen no value; the layer did not run: give data that reaches it")
        return (self._sum / self.samples).to(torch.float32)
