"""A draft in a format with scales: value = scale * (code - zero point)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.core import (
    QuantizedTensor,
    round_scale,
    split_int8_scale,
    split_super_scale,
    spread_super_scale,
)
from narrowcast.methods.draft import Draft, nearest

_LARGEST_SCALE = {"fp16": 65504.0, "e8m0": 2.0**127}
_LARGEST_CODE = {"int8": 127, "k6": 63}


@dataclass
class ScaledDraft(Draft):
    """Codes, scales and zero points that are still being found.

    Args:
        scale: [block_rows, block_columns] float32, numbers of the scale format.
        zero_point: of that shape, int32 or float32 as the spec has it; None when symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(cls, record: QuantizedTensor) -> ScaledDraft:
        """A draft that starts as `record`, sharing nothing with it."""
        assert record.scale is not None
        zero_point = None if record.zero_point is None else record.zero_point.clone()
        values = record.dequantize().t().to(torch.float64).contiguous()
        codes = record.codes.t().contiguous().clone()
        return cls(record.spec, record.shape, codes, values, record.scale.clone(), zero_point)

    def record(self) -> QuantizedTensor:
        """See `Draft`."""
        return QuantizedTensor(self.codes.t().contiguous(), self.scale, self.zero_point, self.spec)

    def round_column_(self, column: int, wanted: Tensor) -> Tensor:
        """See `Draft`."""
        group = column // self.wide
        zero_point = None if self.zero_point is None else self.by_row(self.zero_point[:, group]).unsqueeze(0)
        scale = self.by_row(self.scale[:, group]).unsqueeze(0)
        codes, values = nearest(wanted.unsqueeze(0), self.spec, scale, zero_point)
        self.codes[column], self.values[column] = codes[0], values[0]
        return self.values[column]

    def adopt_(self, group: int, found: QuantizedTensor) -> None:
        """See `Draft`; the scales as the scale format holds them beside the others."""
        assert found.scale is not None
        self.scale[:, group] = self.stored_scale(found.scale[:, 0], group)
        if self.zero_point is not None and found.zero_point is not None:
            self.zero_point[:, group] = found.zero_point[:, 0]

    def refit_(self, group: int, slope: Tensor, hessian: Tensor) -> Tensor:
        """See `Draft`; the codes stay as they are."""
        columns = self.columns(group)
        old = self.scale[:, group].to(torch.float64)
        levels = self._levels(group)
        falling = self.sum_rows((levels * slope).sum(0))
        curved = self.sum_rows((levels * (hessian @ levels)).sum(0))
        best = old - falling / curved
        new = self.stored_scale(best, group).to(torch.float64)
        new = torch.where((new - best).abs() < (old - best).abs(), new, old)
        moved = (levels * self.by_row(new)).to(torch.float32).to(torch.float64)  # a stored value is float32
        change = moved - self.values[columns]
        self.scale[:, group], self.values[columns] = new.to(torch.float32), moved
        return change

    def _levels(self, group: int) -> Tensor:
        """What the codes of a block of columns stand for in units of their scale: [columns, out] float64."""
        levels = self.spec.format.decode(self.codes[self.columns(group)])
        if self.zero_point is not None:
            levels = levels - self.by_row(self.zero_point[:, group])
        return levels.to(torch.float64)

    def stored_scale(self, scale: Tensor, group: int) -> Tensor:
        """Scales [block_rows] of a block of columns, rounded to what the scale format holds beside the other blocks.

        8-bit and 6-bit scales are multiples of one number per row of blocks or super-block. That number stays; the
        block with the largest 8-bit multiple defines it and keeps its scale. A scale that is not a positive number is
        no proposal: the present one stays.
        """
        old = self.scale[:, group]
        proposed = torch.where(torch.isfinite(scale) & (scale > 0), scale, old)
        name = self.spec.scale_format
        proposed = proposed.clamp(max=_LARGEST_SCALE.get(name, 3e38)).to(torch.float32)
        if name not in _LARGEST_CODE:
            return round_scale(proposed.unsqueeze(1), self.spec).squeeze(1)
        if name == "int8":
            codes, outer = split_int8_scale(self.scale)
            shared, fixed = outer.squeeze(1), codes[:, group] == codes.amax(1)
        else:
            codes, outer = split_super_scale(self.scale, self.spec)
            shared, fixed = spread_super_scale(outer, self.spec, codes.shape[1])[:, group], torch.zeros_like(old).bool()
        return torch.where(fixed, old, (proposed / shared).round().clamp(1, _LARGEST_CODE[name]) * shared)

    def take_rows_(self, other: Draft, blocks: Tensor) -> None:
        """See `Draft`."""
        assert isinstance(other, ScaledDraft)
        self.scale[blocks] = other.scale[blocks]
        if self.zero_point is not None and other.zero_point is not None:
            self.zero_point[blocks] = other.zero_point[blocks]
        self.take_codes_(other, self.by_row(blocks))
