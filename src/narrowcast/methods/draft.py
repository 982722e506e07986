"""A quantized matrix while a sequential solver works on it: column by column, in any format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from narrowcast.core import QuantizedTensor, QuantSpec, block_shape, dequantize_blocks, quantize_blocks

_LARGEST = torch.finfo(torch.float32).max


def nearest(values: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes nearest to values, each under its own scale, and the numbers they stand for.

    The arithmetic of `core.quantize`, bit for bit.

    Args:
        values: [columns, out] float; rounded to float32 first.
        spec: target format, one with scales.
        scale: [columns, out] float32.
        zero_point: [columns, out] int32 or float32; None when symmetric.

    Returns:
        codes [columns, out] in the format's storage dtype, and float64 of that shape.
    """
    blocks = as_float32(values).unsqueeze(-1)
    codes = quantize_blocks(blocks, spec, scale, zero_point)
    return codes.squeeze(-1), dequantize_blocks(codes, spec, scale, zero_point).squeeze(-1).to(torch.float64)


def as_float32(values: Tensor) -> Tensor:
    """The nearest finite float32 numbers."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float32)


@dataclass
class Draft(ABC):
    """Codes that are still being found, and what gives them meaning.

    Codes and values are transposed, so that a column of the weight lies together in memory.

    Args:
        spec: target format, no cast.
        shape: (out, in) of the matrix.
        codes: [in, out] in the storage dtype of the format.
        values: [in, out] float64, what the codes stand for.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    codes: Tensor
    values: Tensor

    @abstractmethod
    def record(self) -> QuantizedTensor:
        """The finished record."""

    @abstractmethod
    def round_column_(self, column: int, wanted: Tensor) -> Tensor:
        """Give a column the codes nearest to what is wanted [out]; returns the values [out] that it is stored as."""

    @abstractmethod
    def adopt_(self, group: int, found: QuantizedTensor) -> None:
        """Take over what gives the codes of a block of columns their meaning, from a record of these columns alone."""

    @abstractmethod
    def refit_(self, group: int, slope: Tensor, hessian: Tensor) -> Tensor:
        """Move what gives the codes of a block of columns their meaning to where the error is least.

        Args:
            group: the block of columns.
            slope: [columns, out] float64: half the slope of the error in the values.
            hessian: [columns, columns] float64.

        Returns:
            By how much the values [columns, out] moved, float64; no block of rows has a larger error than before.
        """

    @abstractmethod
    def take_rows_(self, other: Draft, blocks: Tensor) -> None:
        """Become `other`, a draft of the same kind, in some blocks of rows [block_rows] bool."""

    @property
    def wide(self) -> int:
        """Columns that share a scale; the last ones may be fewer."""
        return block_shape(self.spec.granularity, self.shape)[1]

    @property
    def tall(self) -> int:
        """Rows that share a scale; the last ones may be fewer."""
        return block_shape(self.spec.granularity, self.shape)[0]

    @property
    def groups(self) -> int:
        """Blocks of columns."""
        return -(-self.shape[1] // self.wide)

    def columns(self, group: int) -> slice:
        """The columns of one block."""
        return slice(group * self.wide, min((group + 1) * self.wide, self.shape[1]))

    def by_row(self, per_block: Tensor) -> Tensor:
        """One value per block of rows [..., block_rows], repeated to every row [..., out]."""
        return per_block.repeat_interleave(self.tall, -1)[..., : self.shape[0]]

    def sum_rows(self, per_row: Tensor) -> Tensor:
        """The sum over the rows of every block: [..., out] to [..., block_rows]."""
        if self.tall == 1:
            return per_row
        padded = pad(per_row, (0, -per_row.shape[-1] % self.tall))
        return padded.view(*padded.shape[:-1], -1, self.tall).sum(-1)

    def take_codes_(self, other: Draft, rows: Tensor) -> None:
        """The codes and values of `other` in some rows [out] bool."""
        self.values[:, rows] = other.values[:, rows]
        # as bytes: float8 tensors cannot be indexed by a mask, and every such format has codes of one byte
        self.codes.view(torch.uint8)[:, rows] = other.codes.view(torch.uint8)[:, rows]
