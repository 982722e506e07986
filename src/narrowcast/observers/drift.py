"""Drift: how the input of a layer differs from the float model's, multiplied with itself: the mean of (x' - x) x^T.

x' is what the float model has at the input of a layer, x what it is behind the layers that are quantized already. Sums
are those of `Hessian`: chunks of a fixed length in float64, the same bits for every batch split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite

# As in `Hessian`.
_CHUNK = 256


class Drift:
    """Mean over all positions of (x' - x) x^T; channels are the last dimension of both batches."""

    def __init__(self) -> None:
        self._batches = 0
        self._samples = 0
        self._sums: Tensor | None = None  # [channels, channels] float64
        self._waiting: Tensor | None = None  # [fewer than _CHUNK, 2 * channels] float32: x' and x

    def update(self, exact: Tensor, batch: Tensor) -> None:
        """Take in a batch.

        Args:
            exact: [..., channels] float: x', the float model's.
            batch: x, the same positions behind quantized layers.

        Raises:
            DataError: a value is not finite, the shapes differ, or the number of channels has changed; the observer
                is unchanged.
        """
        pair = [check_finite(part, "Drift", self._batches) for part in (exact, batch)]
        if pair[0].shape != pair[1].shape or pair[0].dim() == 0:
            raise DataError(f"Drift: batches of shapes {tuple(exact.shape)} and {tuple(batch.shape)} are not one input")
        channels = pair[0].shape[-1]
        if self._sums is not None and self._sums.shape[0] != channels:
            raise DataError(
                f"Drift: batch {self._batches} has {channels} channels, the batches before had {self._sums.shape[0]}"
            )
        self._batches += 1
        if pair[0].numel() == 0:
            return
        rows = torch.cat(pair, dim=-1).view(-1, 2 * channels)
        if self._sums is None or self._waiting is None:
            self._sums = torch.zeros(channels, channels, dtype=torch.float64, device=rows.device)
            self._waiting = rows[:0]
        self._samples += rows.shape[0]
        rows = torch.cat([self._waiting, rows])
        whole = rows.shape[0] // _CHUNK * _CHUNK
        for chunk in rows[:whole].split(_CHUNK) if whole else ():
            _add_products_(self._sums, chunk)
        self._waiting = rows[whole:].clone()

    def result(self) -> Tensor:
        """Mean of (x' - x) x^T [channels, channels] float64; asking changes nothing.

        Raises:
            DataError: nothing was observed.
        """
        if self._sums is None or self._waiting is None:
            raise DataError(f"Drift has seen no value in {self._batches} batches; give data that reaches the layer")
        total = self._sums.clone()
        _add_products_(total, self._waiting)
        return total / self._samples


def _add_products_(sums: Tensor, rows: Tensor) -> None:
    exact, now = rows.to(torch.float64).chunk(2, dim=1)
    sums.addmm_((exact - now).t(), now)
