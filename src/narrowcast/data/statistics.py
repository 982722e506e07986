"""What one reading of calibration data leaves behind: counts and sums, in bounded memory, without running a model.

Knows tensors and their names; what the numbers mean for a model, and which are bad, is decided by the doctor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrowcast.data.batches import Batch
from narrowcast.data.signature import Signature

HASHED_ROWS = 1 << 18
_CHUNK = 1 << 20
_SHORTEST_ROW = 8
_SMALLEST_IMAGE = 8
_MASK = "attention_mask"


def named_inputs(batch: Batch, signature: Signature) -> dict[str, Tensor]:
    """The tensors of a batch that are inputs, by the name of the parameter of `forward`, else by their position."""
    named = {signature.name_of(i) or f"input {i + 1}": value for i, value in enumerate(batch.args)}
    return {name: value for name, value in {**named, **batch.kwargs}.items() if isinstance(value, Tensor)}


class RowHashes:
    """Counts the rows that were met before, by 64-bit hashes of at most `HASHED_ROWS` rows.

    Args:
        rows: rows looked at.
        repeated: those of them that equal an earlier one.
    """

    def __init__(self) -> None:
        self.rows = self.repeated = 0
        self._met: set[int] = set()
        self._factors: dict[int, Tensor] = {}

    def update(self, values: Tensor, real: Tensor | None) -> None:
        """Take in the rows of a batch.

        Args:
            values: [rows, ...].
            real: [rows, columns] bool, False where a row of [rows, columns] values is padded; None without padding.
                Rows that differ in their padding only are the same.
        """
        rows = values.detach().reshape(values.shape[0], -1)
        if rows.shape[1] < _SHORTEST_ROW:  # two short rows may well be alike: the first letters of two texts
            return
        height = max(1, _CHUNK // rows.shape[1])
        for start in range(0, min(rows.shape[0], HASHED_ROWS - self.rows), height):
            part = slice(start, start + height)
            for code in self._hash(rows[part], None if real is None else real[part]):
                self.rows += 1
                self.repeated += code in self._met
                self._met.add(code)

    def _hash(self, rows: Tensor, real: Tensor | None) -> list[int]:
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = rows.contiguous().cpu()
        if bits.is_floating_point():
            bits = bits.view(integers[bits.element_size()])
        bits = bits.to(torch.int64)
        factors = self._factors_for(rows.shape[1])
        if real is None:
            mixed = (bits + 1) * factors
        else:
            position = (real.cpu().cumsum(1) - 1).clamp(min=0)  # left and right padding shift nothing
            mixed = (bits + 1) * factors[position] * real.cpu()
        # without the shift, rows of powers of two would meet too often: a sum modulo 2^64 keeps their low bits only
        codes: list[int] = (mixed ^ (mixed >> 29)).sum(1).tolist()
        return codes

    def _factors_for(self, columns: int) -> Tensor:
        if columns not in self._factors:
            if len(self._factors) > 8:
                self._factors.clear()
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(-(2**63), 2**63 - 1, (columns,), dtype=torch.int64, generator=generator)
            self._factors[columns] = drawn | 1
        return self._factors[columns]


@dataclass
class TokenCounts:
    """What an input of token ids holds.

    Args:
        counts: [vocabulary] how often each id was met, padding left out; None where the table is not known.
        tokens: ids that are no padding.
        padding: ids that are.
        longest: tokens of the longest row.
    """

    counts: Tensor | None = None
    tokens: int = 0
    padding: int = 0
    longest: int = 0

    def update(self, ids: Tensor, real: Tensor | None) -> None:
        """Take in ids [rows, tokens], all of them inside the vocabulary where that is known."""
        kept = ids.reshape(-1) if real is None else ids[real]
        self.tokens += kept.numel()
        self.padding += ids.numel() - kept.numel()
        lengths = real.sum(1) if real is not None else torch.tensor([ids.numel() // max(ids.shape[0], 1)])
        self.longest = max(self.longest, int(lengths.max()))
        if self.counts is not None:
            self.counts += torch.bincount(kept.reshape(-1).cpu(), minlength=self.counts.numel())

    def evenness(self) -> tuple[float, float] | None:
        """How much more often two tokens are equal than if ids were drawn at random, and that figure's deviation.

        1 for ids drawn evenly from the whole vocabulary; 6 for text in 512 pieces, 508 for text in 30,522.
        """
        if self.counts is None or self.tokens < 2:
            return None
        vocabulary = self.counts.numel()
        pairs = float((self.counts.double() * (self.counts.double() - 1)).sum())
        return vocabulary * pairs / (self.tokens * (self.tokens - 1.0)), math.sqrt(2.0 * vocabulary) / self.tokens


@dataclass
class ValueStatistics:
    """What an input of real numbers holds.

    Args:
        low, high: smallest and largest value.
        whole: whether every value is a whole number.
        rows: rows of at least eight values.
        constant: those of them whose values are all equal.
        products, squares: sums over images of neighbouring pixels' products and of squares, each image's mean removed.
        pixels: how many products there are.
    """

    low: float = math.inf
    high: float = -math.inf
    whole: bool = True
    rows: int = 0
    constant: int = 0
    products: float = 0.0
    squares: float = 0.0
    pixels: int = 0

    def update(self, values: Tensor) -> None:
        """Take in values [rows, ...]."""
        values = values.detach().float()
        low, high = (float(bound) for bound in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.whole = self.whole and bool((values == values.round()).all())
        rows = values.reshape(values.shape[0], -1)
        if rows.shape[1] >= _SHORTEST_ROW:
            smallest, largest = rows.aminmax(dim=1)
            self.rows += rows.shape[0]
            self.constant += int((smallest == largest).sum())
        if values.dim() == 4 and min(values.shape[2:]) >= _SMALLEST_IMAGE:
            centred = values - values.mean((2, 3), keepdim=True)
            self.products += float((centred[..., 1:] * centred[..., :-1]).double().sum())
            self.squares += float(centred[..., 1:].double().square().sum())
            self.pixels += centred[..., 1:].numel()

    def correlation(self) -> float | None:
        """Correlation of neighbouring pixels; None without images or where they are constant."""
        return self.products / self.squares if self.squares > 0 else None


@dataclass
class DataStatistics:
    """Everything that is counted while calibration data is read.

    Args:
        signature: of the model's `forward`, for the names of inputs.
        padding: id that pads, by name of the input; used where there is no attention mask.
        batches, rows: how many were read.
        elements: values of the first input, over all batches.
        uncounted: batches that run the model themselves and cannot be looked into.
        hashes: of the rows.
        tokens: by name of the integer inputs of two dimensions.
        values: by name of the floating inputs.
    """

    signature: Signature
    padding: Mapping[str, int] = field(default_factory=dict)
    batches: int = 0
    rows: int = 0
    elements: int = 0
    uncounted: int = 0
    hashes: RowHashes = field(default_factory=RowHashes)
    tokens: dict[str, TokenCounts] = field(default_factory=dict)
    values: dict[str, ValueStatistics] = field(default_factory=dict)

    def expect_ids(self, name: str, vocabulary: int) -> None:
        """Count the ids of an input one by one; they are below `vocabulary`."""
        self.tokens[name] = TokenCounts(torch.zeros(vocabulary, dtype=torch.int64))

    def update(self, batch: Batch) -> None:
        """Take in a batch whose ids are inside their vocabularies."""
        self.batches += 1
        if batch.call is not None:
            self.uncounted += 1
            return
        self.rows += batch.samples
        inputs = named_inputs(batch, self.signature)
        self.elements += next((value.numel() for value in inputs.values()), 0)
        mask = inputs.get(_MASK)
        for index, (name, value) in enumerate(inputs.items()):
            if value.dim() == 0 or value.numel() == 0 or value.is_complex() or value.device.type == "meta":
                continue
            real = self._real(name, value, mask)
            if index == 0:
                self.hashes.update(value, real)
            if value.is_floating_point():
                self.values.setdefault(name, ValueStatistics()).update(value)
            elif value.dtype != torch.bool and value.dim() == 2 and name != _MASK:
                self.tokens.setdefault(name, TokenCounts()).update(value, real)

    def _real(self, name: str, value: Tensor, mask: Tensor | None) -> Tensor | None:
        """[rows, tokens] False where a row is padded; None where no padding is known."""
        if value.dim() != 2 or value.is_floating_point():
            return None
        if mask is not None and mask.shape == value.shape:
            return mask.bool()
        if name not in self.padding:
            return None
        is_pad = (value == self.padding[name]).to(torch.int8)
        outside = is_pad.cumprod(1) | is_pad.flip(1).cumprod(1).flip(1)  # from either end; inside it may be a token
        return ~outside.bool()


def out_of_vocabulary(ids: Tensor, size: int) -> tuple[list[int], int] | None:
    """Position and value of the first id that a table of `size` rows does not have; None where all are inside."""
    bad = (ids < 0) | (ids >= size)
    if not bool(bad.any()):
        return None
    position = [int(index) for index in bad.nonzero()[0]]
    return position, int(ids[tuple(position)])
