"""How far outputs are apart: figures of one pair of tensors after the other, without keeping any tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowcast.parity.bounds import Bound

_PIECE = 1 << 22  # elements compared at a time, in float64: 32 MB per operand, whatever the size of the output


@dataclass(frozen=True)
class Difference:
    """What all compared outputs of one layer have shown.

    Args:
        elements: numbers compared.
        differing: of these, numbers that are not equal (a zero's sign does not count).
        beyond: of these, numbers farther apart than the bound allows each of them to be; 0 where it allows or forbids
            nothing to single numbers (no bound, or one in decibel).
        max_absolute: the largest difference, in units of the output.
        sqnr_db: energy of the reference's outputs over energy of the differences, decibel; inf where all are equal.
        first_batch: the first batch with a difference, from 0; None where all are equal.
    """

    elements: int
    differing: int
    beyond: int
    max_absolute: float
    sqnr_db: float
    first_batch: int | None

    @property
    def equal(self) -> bool:
        """Whether all numbers are equal."""
        return self.differing == 0

    @property
    def share(self) -> float:
        """Share of the numbers that are not equal."""
        return self.differing / self.elements if self.elements else 0.0

    def within(self, bound: Bound) -> bool:
        """Whether the bound that the figures were taken under holds."""
        if bound.sqnr_db is not None:
            return self.sqnr_db >= bound.sqnr_db
        return self.equal if bound.is_exact else self.beyond == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "equal": self.equal, "elements": self.elements, "differing": self.differing, "share": self.share,
            "beyond": self.beyond, "max_absolute": self.max_absolute, "sqnr_db": self.sqnr_db,
            "first_batch": self.first_batch,
        }  # fmt: skip


class Tally:
    """Adds up the figures of a `Difference`."""

    def __init__(self) -> None:
        self.calls = self.elements = self.differing = self.beyond = 0
        self.largest = self.signal = self.noise = 0.0
        self.first_batch: int | None = None

    def add(
        self, expected: Tensor, got: Tensor, bound: Bound | None, batch: int, products: Tensor | None = None
    ) -> None:
        """Count one pair of tensors of one shape.

        Args:
            expected: [...] what the reference gave.
            got: [...] what the artefact gave; infinities stand in the same places.
            bound: what each number may differ by; None where nothing is said of it.
            batch: index of the batch.
            products: [...] sum of the magnitudes of the products behind each number, where the bound asks for it.
        """
        self.calls += 1
        self.elements += expected.numel()
        counted = bound if bound is not None and bound.sqnr_db is None else None
        asks = counted is not None and (counted.of_largest or (counted.of_products and products is None))
        top = float(expected.abs().max()) if asks and expected.numel() else 0.0
        parts = (t.reshape(-1).split(_PIECE) for t in (expected, got))
        magnitudes = None if products is None else products.reshape(-1).split(_PIECE)
        for index, (ours, theirs) in enumerate(zip(*parts, strict=True)):
            exact = ours.double().masked_fill(ours.isinf(), 0.0)
            self.signal += float(exact.square().sum())
            if torch.equal(ours, theirs):
                continue
            gap = (exact - theirs.double().masked_fill(theirs.isinf(), 0.0)).abs()
            self.differing += int((gap > 0).sum())
            if counted is not None:
                limit = counted.limit(exact.abs(), top, None if magnitudes is None else magnitudes[index].double())
                self.beyond += int((gap > limit).sum())
            self.largest = max(self.largest, float(gap.max()))
            self.noise += float(gap.square().sum())
            if self.first_batch is None and bool((gap > 0).any()):
                self.first_batch = batch

    def result(self) -> Difference | None:
        """The figures; None where nothing was compared."""
        if not self.calls:
            return None
        decibel = math.inf
        if self.noise:
            decibel = 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        return Difference(self.elements, self.differing, self.beyond, self.largest, decibel, self.first_batch)
