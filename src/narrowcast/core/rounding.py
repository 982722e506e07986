"""Rounding that gradients pass: the one place where training and learned methods get these gradients from.

For every element w of a block with scale s and zero point z,

    code = clamp(round(w / s) + z, code_low, code_high),    value = s * (code - z)

and gradients go straight through the rounding: d value / d w = 1 inside the range and 0 outside, d value / d s =
(code - z) - w / s inside and code - z outside, d value / d z = 0 inside and -s outside. Formats without equal steps
(NF4, FP4, FP8) have levels for code - z, and the same gradients.

Source:
    Straight through: Bengio et al. 2013, arXiv:1308.3432. Gradient of the scale: LSQ (Esser et al. 2019,
    arXiv:1902.08153, eq. 3), of the zero point: LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576, eq. 5). Differs: scales
    are numbers of their stored format and zero points are integers while training, so that what is trained is what is
    saved, bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from narrowcast.core.affine import nearest_scale, round_zero_point
from narrowcast.core.formats import NumberFormat
from narrowcast.core.granularity import from_blocks, to_blocks
from narrowcast.core.spec import QuantSpec


def fake_quantize(matrix: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """The values that the codes of a matrix stand for, differentiable in matrix, scale and zero point.

    Args:
        matrix: [rows, columns] float32.
        scale: [block_rows, block_columns] float32 > 0, numbers of the scale format.
        zero: [block_rows, block_columns] float32, multiples of `spec.zero_step`; None when symmetric.
        spec: a format with scales.

    Returns:
        [rows, columns] float32; the codes are those of `core.quantize` with this scale and zero point, bit for bit.
    """
    values: Tensor = _FakeQuantized.apply(matrix, scale, zero, spec)  # type: ignore[no-untyped-call]
    return values


def through(values: Tensor, spec: QuantSpec, *, zero: bool = False) -> Tensor:
    """Values rounded to the scales, or with `zero` the zero points, that a spec can hold; gradients pass unchanged."""
    rounded: Tensor = _Through.apply(values, spec, zero)  # type: ignore[no-untyped-call]
    return rounded


def integer_steps_(scaled: Tensor, zero: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Code minus zero point of w / s, and whether the code is inside the range.

    Args:
        scaled: [.., elements] w / s, float32; overwritten.
        zero: [..] zero points as float32; None when symmetric.
        spec: an integer format.
    """
    shift = torch.zeros(()) if zero is None else zero.unsqueeze(-1)
    codes = scaled.round_() + shift if spec.zero_step == 1 else scaled.add_(shift).round_().add_(0.0)
    kept = codes.clamp(spec.code_low, spec.code_high)
    return kept - shift, codes == kept


def range_gradients(
    gradient: Tensor, steps: Tensor, scaled: Tensor, inside: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of scale and zero point of each block.

    Args:
        gradient: [.., elements] of the values.
        steps: [.., elements] code minus zero point.
        scaled: [.., elements] w / s.
        inside: [.., elements] bool: whether the code was not clamped.
        scale: [..].
    """
    of_scale = (gradient * (steps - scaled * inside)).sum(-1)
    return of_scale, -(gradient * scale.unsqueeze(-1) * ~inside).sum(-1)


def distinct_levels(number: NumberFormat) -> Tensor:
    """The finite values that codes of a format without equal steps stand for, ascending, each once, float32."""
    if number.levels is not None:
        return torch.tensor(sorted(set(number.levels)), dtype=torch.float32) + 0.0
    return _float_levels(number.storage)


@lru_cache
def _float_levels(storage: torch.dtype) -> Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(storage).to(torch.float32)
    levels: Tensor = torch.unique(values[torch.isfinite(values)] + 0.0)
    return levels


def _steps(scaled: Tensor, zero: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    number = spec.format
    if number.kind == "int":
        return integer_steps_(scaled.clone(), zero, spec)
    kept = scaled.clamp(number.low, number.high)
    return number.decode(number.encode(kept)), kept == scaled


class _FakeQuantized(torch.autograd.Function):
    """Saves the matrix and its scales alone; what the gradient needs besides is computed again."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(matrix, scale, zero)
        ctx.spec = spec
        shape = (matrix.shape[0], matrix.shape[1])
        scaled = to_blocks(matrix, spec.granularity) / scale.unsqueeze(-1)
        if spec.format.kind != "int":
            return from_blocks(_steps(scaled, zero, spec)[0] * scale.unsqueeze(-1), spec.granularity, shape)
        if zero is None or spec.zero_step == 1:
            scaled.round_()
        if zero is not None:
            scaled.add_(zero.unsqueeze(-1))
        if spec.zero_step != 1:
            scaled.round_()
        scaled.clamp_(spec.code_low, spec.code_high)
        if zero is not None:
            scaled.sub_(zero.unsqueeze(-1))
        return from_blocks(scaled.mul_(scale.unsqueeze(-1)), spec.granularity, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        matrix, scale, zero = ctx.saved_tensors
        spec, shape = ctx.spec, (matrix.shape[0], matrix.shape[1])
        gradient = to_blocks(gradients[0], spec.granularity)
        scaled = to_blocks(matrix, spec.granularity) / scale.unsqueeze(-1)
        steps, inside = _steps(scaled, zero, spec)
        of_scale = of_zero = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_scale, of_zero = range_gradients(gradient, steps, scaled, inside, scale)
        of_matrix = from_blocks(gradient * inside, spec.granularity, shape) if ctx.needs_input_grad[0] else None
        return of_matrix, of_scale, None if zero is None else of_zero, None


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, spec: QuantSpec, zero: bool) -> Tensor:
        return round_zero_point(values, spec).to(torch.float32) if zero else nearest_scale(values, spec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None
