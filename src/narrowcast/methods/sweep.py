"""One sweep of GPTQ over the columns of a weight: round one, let the others take over its error, go on.

The error of a column reaches the others of its block at once and all later ones when the block ends, in one matrix
product: that is for speed only. Everything is float64, so where blocks end changes sums by about 1e-16.

Source:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, algorithm 1 (lazy batch updates).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Sweep:
    """Columns on their way from float to stored values; transposed, so that a column of the weight is a row here.

    Args:
        weight: [in, out] float64, columns in the order in which they are rounded; overwritten.
        factor: [in, in] float64 upper triangular U, inverse(H) = U^T U, in that order.
        block: columns between two full updates.
    """

    def __init__(self, weight: Tensor, factor: Tensor, block: int) -> None:
        self._weight, self._factor, self._block = weight, factor, block
        self._start = self._position = 0
        self._errors = weight[:0]

    def run(self, round_column: Callable[[int, Tensor], Tensor]) -> None:
        """Round every column in turn.

        Args:
            round_column: from a position and the column's values [out] by now to the values it is stored as [out].
        """
        columns = self._weight.shape[0]
        for start in range(0, columns, self._block):
            stop = min(start + self._block, columns)
            self._start = start
            self._errors = torch.zeros_like(self._weight[start:stop])
            for position in range(start, stop):
                self._position = position
                self._round_(position, stop, round_column)
            self._weight[stop:].addmm_(self._factor[start:stop, stop:].t(), self._errors, alpha=-1)

    def _round_(self, position: int, stop: int, round_column: Callable[[int, Tensor], Tensor]) -> None:
        values = self._weight[position]
        error = (values - round_column(position, values)) / self._factor[position, position]
        self._errors[position - self._start] = error
        self._weight[position + 1 : stop].addr_(self._factor[position, position + 1 : stop], error, alpha=-1)

    def current(self, positions: Tensor) -> Tensor:
        """Columns at positions not yet rounded, with all errors so far taken over: [positions, out] float64."""
        values = self._weight[positions]
        beyond = positions >= self._start + self._errors.shape[0]
        owed = self._factor[self._start : self._position, positions[beyond]].t()
        values[beyond] -= owed @ self._errors[: self._position - self._start]
        return values
