"""A quantized matrix while a sequential solver works on it: column by column, in any format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from narrowcast.core import (
    QuantizedTensor,
    QuantSpec,
    block_shape,
    dequantize_blocks,
    quantize_blocks,
    round_scale,
    split_int8_scale,
)

_LARGEST_SCALE = {"fp16": 65504.0, "e8m0": 2.0**127}
_LARGEST = torch.finfo(torch.float32).max


def nearest(values: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes nearest to values, each under its own scale, and the numbers they stand for.

    The arithmetic of `core.quantize`, bit for bit.

    Args:
        values: [columns, out] float; rounded to float32 first.
        spec: target format, one with scales.
        scale: [columns, out] float32.
        zero_point: [columns, out] int32; None when symmetric.

    Returns:
        codes [columns, out] in the format's storage dtype, and float64 of that shape.
    """
    blocks = values.clamp(-_LARGEST, _LARGEST).to(torch.float32).unsqueeze(-1)
    codes = quantize_blocks(blocks, spec, scale, zero_point)
    return codes.squeeze(-1), dequantize_blocks(codes, spec, scale, zero_point).squeeze(-1).to(torch.float64)


@dataclass
class Draft:
    """Codes, scales and zero points that are still being found.

    Codes and values are transposed, so that a column of the weight lies together in memory.

    Args:
        spec: target format, one with scales.
        shape: (out, in) of the matrix.
        scale: [block_rows, block_columns] float32, numbers of the scale format.
        zero_point: of that shape, int32; None when symmetric.
        codes: [in, out] in the storage dtype of the format.
        values: [in, out] float64, what the codes stand for.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    scale: Tensor
    zero_point: Tensor | None
    codes: Tensor
    values: Tensor

    @classmethod
    def of(cls, record: QuantizedTensor) -> Draft:
        """A draft that starts as `record`, sharing nothing with it."""
        assert record.scale is not None
        zero_point = None if record.zero_point is None else record.zero_point.clone()
        values = record.dequantize().t().to(torch.float64).contiguous()
        codes = record.codes.t().contiguous().clone()
        return cls(record.spec, record.shape, record.scale.clone(), zero_point, codes, values)

    def record(self) -> QuantizedTensor:
        """The finished record."""
        return QuantizedTensor(self.codes.t().contiguous(), self.scale, self.zero_point, self.spec)

    @property
    def wide(self) -> int:
        """Columns that share a scale; the last ones may be fewer."""
        return block_shape(self.spec.granularity, self.shape)[1]

    @property
    def tall(self) -> int:
        """Rows that share a scale; the last ones may be fewer."""
        return block_shape(self.spec.granularity, self.shape)[0]

    def columns(self, group: int) -> slice:
        """The columns of one block."""
        return slice(group * self.wide, min((group + 1) * self.wide, self.shape[1]))

    def round_column_(self, column: int, wanted: Tensor) -> Tensor:
        """Give a column the codes nearest to what is wanted [out]; returns the values [out] that it is stored as."""
        group = column // self.wide
        zero_point = None if self.zero_point is None else self.by_row(self.zero_point[:, group]).unsqueeze(0)
        scale = self.by_row(self.scale[:, group]).unsqueeze(0)
        codes, values = nearest(wanted.unsqueeze(0), self.spec, scale, zero_point)
        self.codes[column], self.values[column] = codes[0], values[0]
        return self.values[column]

    def levels(self, group: int) -> Tensor:
        """What the codes of a block of columns stand for in units of their scale: [columns, out] float64."""
        levels = self.spec.format.decode(self.codes[self.columns(group)])
        if self.zero_point is not None:
            levels = levels - self.by_row(self.zero_point[:, group])
        return levels.to(torch.float64)

    def by_row(self, per_block: Tensor) -> Tensor:
        """One value per block of rows [block_rows], repeated to every row [out]."""
        return per_block.repeat_interleave(self.tall, -1)[: self.shape[0]]

    def sum_rows(self, per_row: Tensor) -> Tensor:
        """The sum over the rows of every block: [out] to [block_rows]."""
        missing = -per_row.shape[0] % self.tall
        return pad(per_row, (0, missing)).unflatten(0, (-1, self.tall)).sum(1)

    def stored_scale(self, scale: Tensor, group: int) -> Tensor:
        """Scales [block_rows] of a block of columns, rounded to what the scale format holds beside the other blocks.

        8-bit scales are multiples of one number per row of blocks; the block with the largest multiple defines it and
        keeps its scale. A scale that is not a positive number is no proposal: the present one stays.
        """
        old = self.scale[:, group]
        proposed = torch.where(torch.isfinite(scale) & (scale > 0), scale, old)
        proposed = proposed.clamp(max=_LARGEST_SCALE.get(self.spec.scale_format, 3e38)).to(torch.float32)
        if self.spec.scale_format != "int8":
            return round_scale(proposed.unsqueeze(1), self.spec).squeeze(1)
        codes, outer = split_int8_scale(self.scale)
        multiple = (proposed / outer.squeeze(1)).round().clamp(1, 127)
        return torch.where(codes[:, group] == codes.amax(1), old, multiple * outer.squeeze(1))

    def take_rows_(self, other: Draft, blocks: Tensor) -> None:
        """Become `other` in some blocks of rows [block_rows] bool."""
        rows = self.by_row(blocks)
        self.scale[blocks] = other.scale[blocks]
        if self.zero_point is not None and other.zero_point is not None:
            self.zero_point[blocks] = other.zero_point[blocks]
        self.values[:, rows] = other.values[:, rows]
        # as bytes: float8 tensors cannot be indexed by a mask, and every scaled format has codes of one byte
        self.codes.view(torch.uint8)[:, rows] = other.codes.view(torch.uint8)[:, rows]
