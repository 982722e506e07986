"""QuantizedTensor: codes and what gives them meaning, as a plain record; and the way back to float."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.core.granularity import from_blocks, scale_shape, to_blocks
from narrowcast.core.spec import QuantSpec
from narrowcast.errors import FormatError


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix in a number format: `value = scale * (code - zero_point)`.

    Two records are equal when their specs are and their tensors are, bit for bit.

    Args:
        codes: [rows, columns] in the format's storage dtype, one element per code (not packed).
        scale: [block_rows, block_columns] float32 with values that the scale format can hold exactly;
            None for fp32, fp16 and bf16, whose codes are their values.
        zero_point: [block_rows, block_columns] int32, the code of 0.0; float32 where `spec.zero_step` is below 1, as
            zero points then lie between codes; None when symmetric.
        spec: how the matrix is stored.
        levels: [block_rows, block_columns, 2^bits] float32 with float16 values, ascending: the value of every code of a
            block in formats with learned levels, which have no scale; None in all others.

    Raises:
        FormatError: a tensor has another dtype or shape than `spec` asks for.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    spec: QuantSpec
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        number = self.spec.format
        if self.codes.dim() != 2 or self.codes.dtype != number.storage:
            raise FormatError(
                f"{self.spec}: codes are a matrix of {number.storage}, got {self.codes.dtype} of shape "
                f"{tuple(self.codes.shape)}"
            )
        expected = scale_shape(self.spec.granularity, self.shape)
        self._check_part("scales", self.scale, torch.float32, expected if number.scaled else None)
        zeros = torch.int32 if self.spec.zero_step == 1 else torch.float32
        self._check_part("zero points", self.zero_point, zeros, None if self.spec.symmetric else expected)
        tables = (*expected, 2**number.bits) if number.learned else None
        self._check_part("levels", self.levels, torch.float32, tables)

    def _check_part(self, name: str, part: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
        got = None if part is None else (part.dtype, tuple(part.shape))
        if got == (None if shape is None else (dtype, shape)):
            return
        want = f"no {name}" if shape is None else f"{dtype} {name} of shape {shape}"
        has = "none" if got is None else f"{got[0]} of shape {got[1]}"
        rows, columns = self.shape
        raise FormatError(f"{self.spec} on a {rows}x{columns} matrix has {want}, got {has}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        parts = ("codes", "scale", "zero_point", "levels")
        return self.spec == other.spec and all(_same_bits(getattr(self, part), getattr(other, part)) for part in parts)

    __hash__ = None  # type: ignore[assignment]  # tensors are compared by value and can change

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The float32 matrix [rows, columns] that the codes stand for."""
        if self.levels is not None:
            blocks = to_blocks(self.codes, self.spec.granularity)
            return from_blocks(level_values(blocks, self.levels), self.spec.granularity, self.shape)
        if self.scale is None:
            return self.spec.format.decode(self.codes)
        blocks = to_blocks(self.codes, self.spec.granularity)
        values = dequantize_blocks(blocks, self.spec, self.scale, self.zero_point)
        return from_blocks(values, self.spec.granularity, self.shape)


def dequantize_blocks(codes: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The equation: float32 values of codes in block view.

    Args:
        codes: [block_rows, block_columns, elements] in the format's storage dtype.
        spec: what the codes mean.
        scale: [block_rows, block_columns] float32.
        zero_point: [block_rows, block_columns] int32 or float32; None when symmetric.
    """
    values = spec.format.decode(codes)
    if zero_point is not None:
        values = values - zero_point.unsqueeze(-1).to(torch.float32)
    return values * scale.unsqueeze(-1)


def level_values(codes: Tensor, levels: Tensor) -> Tensor:
    """What codes mean where every block has levels of its own.

    Args:
        codes: [block_rows, block_columns, elements] uint8.
        levels: [block_rows, block_columns, 2^bits] float32.

    Returns:
        values: [block_rows, block_columns, elements] float32.
    """
    return levels.gather(-1, codes.to(torch.int64))


def _same_bits(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    return torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
