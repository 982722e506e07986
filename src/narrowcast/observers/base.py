"""What an observer is: it remembers enough of a stream of tensors to name a range, and nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from narrowcast.errors import DataError


class Observer(ABC):
    """Watches the values of one activation and, at the end, names the range that its codes should cover.

    Memory is bounded, and the answer is the same, bit for bit, however the data is split into batches.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._values = 0

    def update(self, batch: Tensor) -> None:
        """Take in a batch.

        Args:
            batch: [...] any shape, any float dtype; may be empty.

        Raises:
            DataError: a value is not finite; the message names the first, and the observer is unchanged.
        """
        values = check_finite(batch, type(self).__name__, self._batches)
        if values.numel():
            self._take(values)
        self._batches += 1
        self._values += values.numel()

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= high, in the units of the data.

        Raises:
            DataError: nothing was observed.
        """
        if self._values == 0:
            raise DataError(
                f"{type(self).__name__} has seen no value in {self._batches} batches; the layer did not run, or the "
                "calibration data is empty: give data that reaches it"
            )
        return self._range()

    @abstractmethod
    def _take(self, values: Tensor) -> None:
        """Take in float32 values, finite, at least one."""

    @abstractmethod
    def _range(self) -> tuple[float, float]:
        """The range of what was seen, at least one value."""


def check_finite(batch: Tensor, name: str, batches: int) -> Tensor:
    """The batch as detached float32.

    Raises:
        DataError: it is not a float tensor, or a value is not finite; the message names the first one.
    """
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise DataError(f"{name} takes float tensors, got {kind} in batch {batches}; convert the data to float32")
    values = batch.detach().to(torch.float32)
    if values.numel() == 0:
        return values
    low, high = (float(bound) for bound in values.aminmax())  # NaN and infinity both reach the bounds
    if math.isfinite(low) and math.isfinite(high):
        return values
    finite = torch.isfinite(values)
    where = tuple(int(index) for index in (~finite).nonzero()[0])
    raise DataError(
        f"{name}: batch {batches} has {float(values[where])} at {where} ({int((~finite).sum())} of {values.numel()} "
        "values are not finite); clean the calibration data or the model's weights"
    )


def in_threads(count: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """`count` of every part, in order, one part per thread.

    Threads over parts and not inside of operations: an operation on a part takes microseconds, and on a busy machine
    waiting for its other half takes a scheduler's time slice.
    """
    if len(parts) < 2:
        yield from map(count, parts)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(count, parts)
