"""Hessian: the mean of x x^T over all input vectors, which is the second derivative of a layer's squared output error.

Rows are collected into chunks of a fixed length before they are multiplied, so the sums are the same, bit for bit,
however the data is split into batches. Products of float32 numbers are exact in float64 and are summed there: another
order of the rows or another number of threads changes the result by about 1e-16 of its size, which changes no code
short of an exact tie. Memory is [channels, channels] float64 and one chunk, whatever the length of the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers.base import check_finite

# Rows multiplied at once: enough for a matrix product at full speed, 8 MB at 4096 channels.
_CHUNK = 256


class Hessian:
    """Mean over all positions of the outer product of the channels; channels are the last dimension of the batches."""

    def __init__(self) -> None:
        self._batches = 0
        self._samples = 0
        self._sums: Tensor | None = None  # [channels, channels] float64
        self._waiting: Tensor | None = None  # [fewer than _CHUNK, channels] float32

    @property
    def samples(self) -> int:
        """How many input vectors were seen."""
        return self._samples

    def update(self, batch: Tensor) -> None:
        """Take in a batch.

        Args:
            batch: [..., channels] float; may be empty.

        Raises:
            DataError: a value is not finite, there is no channel dimension, or the number of channels has changed;
                the observer is unchanged.
        """
        values = check_finite(batch, "Hessian", self._batches)
        if values.dim() == 0:
            raise DataError("Hessian: a batch without dimensions has no channels; give [..., channels]")
        channels = values.shape[-1]
        if self._sums is not None and self._sums.shape[0] != channels:
            raise DataError(
                f"Hessian: batch {self._batches} has {channels} channels, the batches before had {self._sums.shape[0]}"
            )
        self._batches += 1
        if values.numel() == 0:
            return
        rows = values.reshape(-1, channels)
        if self._sums is None or self._waiting is None:
            self._sums = torch.zeros(channels, channels, dtype=torch.float64, device=rows.device)
            self._waiting = rows[:0]
        self._samples += rows.shape[0]
        rows = torch.cat([self._waiting, rows])
        whole = rows.shape[0] // _CHUNK * _CHUNK
        for chunk in rows[:whole].split(_CHUNK) if whole else ():
            _add_products_(self._sums, chunk)
        self._waiting = rows[whole:].clone()  # not a view that keeps the batch alive

    def result(self) -> Tensor:
        """Mean of x x^T [channels, channels] float64, symmetric; asking changes nothing.

        Raises:
            DataError: nothing was observed.
        """
        if self._sums is None or self._waiting is None:
            raise DataError(
                f"Hessian has seen no value in {self._batches} batches; the layer did not run, or the calibration "
                "data is empty: give data that reaches it"
            )
        total = self._sums.clone()
        _add_products_(total, self._waiting)
        return (total + total.t()) / (2 * self._samples)

    def state(self) -> dict[str, Tensor]:
        """Everything it remembers, as tensors that can be saved; `load_state` of it continues with the same bits."""
        counts = torch.tensor([self._batches, self._samples], dtype=torch.int64)
        if self._sums is None or self._waiting is None:
            return {"counts": counts}
        return {"counts": counts, "sums": self._sums.clone(), "waiting": self._waiting.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of the observer whose `state` this is.

        Raises:
            DataError: it is not the state of such an observer.
        """
        if not _is_state(state):
            found = {name: tuple(tensor.shape) for name, tensor in state.items()}
            raise DataError(f"Hessian: {found} is not a saved state; start the calibration again")
        self._batches, self._samples = (int(count) for count in state["counts"])
        self._sums = state["sums"].clone() if "sums" in state else None
        self._waiting = state["waiting"].clone() if "waiting" in state else None


def _add_products_(sums: Tensor, rows: Tensor) -> None:
    """Add x x^T of every row of [rows, channels] float32."""
    exact = rows.to(torch.float64)
    sums.addmm_(exact.t(), exact)


def _is_state(state: Mapping[str, Tensor]) -> bool:
    if set(state) not in ({"counts"}, {"counts", "sums", "waiting"}) or tuple(state["counts"].shape) != (2,):
        return False
    if "sums" not in state:
        return int(state["counts"][1]) == 0
    sums, waiting = state["sums"], state["waiting"]
    kinds = sums.dtype == torch.float64 and waiting.dtype == torch.float32
    square = sums.dim() == waiting.dim() == 2 and sums.shape[0] == sums.shape[1] == waiting.shape[1]
    return kinds and square and waiting.shape[0] < _CHUNK
