"""QuantizedTensor: codes and what gives them meaning, as a plain record."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.core.granularity import expand_to_matrix
from narrowcast.core.spec import QuantSpec


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix in a number format: `value = scale * (code - zero_point)`.

    Args:
        codes: [rows, columns] in the format's storage dtype, one element per code (not packed).
        scale: [block_rows, block_columns] float32 with values that the scale format can hold exactly;
            None for fp32, fp16 and bf16, whose codes are their values.
        zero_point: [block_rows, block_columns] int32, the code of 0.0; None when symmetric.
        spec: how the matrix is stored.
    """

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    spec: QuantSpec

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The float32 matrix [rows, columns] that the codes stand for."""
        values = self.spec.format.decode(self.codes)
        if self.scale is None:
            return values
        if self.zero_point is not None:
            zero_point = expand_to_matrix(self.zero_point, self.spec.granularity, self.shape)
            values = values - zero_point.to(torch.float32)
        return values * expand_to_matrix(self.scale, self.spec.granularity, self.shape)
