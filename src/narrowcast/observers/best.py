"""Best: several observers in one pass, and the range of the one whose codes are nearest to what was seen.

    best(minmax, percentile(99.9), entropy)        best: all that there are, with their defaults

Each candidate's range is held against the histogram of all values, error(low, high) as in `mse.py`; the least error
wins, and among equals the one that is named first. `mse` searches for this very minimum: named with others it wins
or ties, and shows by how much they lose. What a model loses by clipping is not in this error: on MobileNetV1 the full
range is the best one at the output and not in this measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.errors import RecipeError
from narrowcast.observers.base import Observer
from narrowcast.observers.histogram import Histogram
from narrowcast.observers.mse import squared_error


@dataclass(frozen=True)
class Candidate:
    """What one observer proposes.

    Args:
        observer: as the recipe names it.
        low, high: its range, widened to contain 0.
        sqnr_db: of all values seen, rounded to the codes of that range; inf where nothing is lost.
    """

    observer: str
    low: float
    high: float
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.observer} [{self.low:.4g}, {self.high:.4g}] {self.sqnr_db:.2f} dB"


class Values(Observer):
    """The distribution of all values; its range is the full one."""

    def __init__(self) -> None:
        super().__init__()
        self.histogram = Histogram()

    def _take(self, values: Tensor) -> None:
        self.histogram.add(values)

    def _range(self) -> tuple[float, float]:
        bins = self.histogram.bins()
        return bins.low, bins.high


class Best(Observer):
    """The candidate with the least squared error over all values.

    Args:
        members: at least two observers by the texts that name them.
        bits: of the codes that will be used.
        symmetric: whether the range is -high..high.

    Raises:
        RecipeError: there are fewer than two members.
    """

    def __init__(self, members: Mapping[str, Observer], *, bits: int = 8, symmetric: bool = False) -> None:
        super().__init__()
        if len(members) < 2:
            raise RecipeError(
                f"best({', '.join(members)}): there is nothing to choose from; name two observers, like "
                "'best(minmax,mse)', or all by 'best'"
            )
        self.members, self.values = dict(members), Values()
        self.bits, self.symmetric = bits, symmetric

    def update(self, batch: Tensor) -> None:
        """See `Observer.update`; every member takes in the batch."""
        for observer in self.parts().values():
            observer.update(batch)

    def range(self) -> tuple[float, float]:
        """See `Observer.range`."""
        return self._range()

    def parts(self) -> dict[str, Observer]:
        """The members and what they are measured by, by name: what this observer remembers."""
        return {"all values": self.values, **self.members}

    def candidates(self) -> list[Candidate]:
        """What every member proposes, the best first.

        Raises:
            DataError: nothing was observed.
        """
        ranges = [self._contains_zero(*observer.range()) for observer in self.members.values()]
        bins = self.values.histogram.bins()
        lows, highs = torch.tensor(ranges, dtype=torch.float64).unbind(1)
        levels = 2**self.bits - int(self.symmetric)
        errors = squared_error(bins, lows, highs, levels).tolist()
        signal = float((bins.counts * bins.centers.square()).sum())
        found = [
            Candidate(name, low, high, 10.0 * math.log10(signal / error) if error else math.inf)
            for name, (low, high), error in zip(self.members, ranges, errors, strict=True)
        ]
        return sorted(found, key=lambda candidate: -candidate.sqnr_db)

    def __str__(self) -> str:
        first, *others = self.candidates()
        return f"by {first.observer} {first.sqnr_db:.2f} dB; {'; '.join(map(str, others))}"

    def _take(self, values: Tensor) -> None:
        raise AssertionError("update gives batches to the members")

    def _range(self) -> tuple[float, float]:
        best = self.candidates()[0]
        return best.low, best.high

    def _contains_zero(self, low: float, high: float) -> tuple[float, float]:
        low, high = min(low, 0.0), max(high, 0.0)
        return (-max(-low, high), max(-low, high)) if self.symmetric else (low, high)
