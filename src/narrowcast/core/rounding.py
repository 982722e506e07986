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
from narrowcast.core.pieces import pieces
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
        blocks = to_blocks(matrix, spec.granularity)
        values = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        for target, parts in zip(pieces(values), _parts(blocks, scale, zero), strict=True):
            _values_(target, *parts, spec)
        return from_blocks(values, spec.granularity, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        matrix, scale, zero = ctx.saved_tensors
        spec, shape, needs = ctx.spec, (matrix.shape[0], matrix.shape[1]), ctx.needs_input_grad
        gradient, blocks = to_blocks(gradients[0], spec.granularity), to_blocks(matrix, spec.granularity)
        of_blocks = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        found = [
            _gradients_(target, part, *rest, spec, ranges=needs[1] or needs[2])
            for target, part, rest in zip(pieces(of_blocks), pieces(gradient), _parts(blocks, scale, zero), strict=True)
        ]
        of_scale, of_zero = (None if part[0] is None else torch.cat(part) for part in zip(*found, strict=True))
        of_matrix = from_blocks(of_blocks, spec.granularity, shape) if needs[0] else None
        return of_matrix, of_scale, of_zero, None


def _parts(blocks: Tensor, scale: Tensor, zero: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Blocks, scales and zero points of one piece after the other."""
    cut = pieces(blocks)
    sizes = [part.shape[0] for part in cut]
    zeros = [None] * len(cut) if zero is None else torch.split(zero, sizes)
    return list(zip(cut, torch.split(scale, sizes), zeros, strict=True))


def _values_(target: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> None:
    """Write what the codes of some blocks stand for."""
    each = scale.unsqueeze(-1)
    if spec.format.kind != "int":
        target.copy_(_steps(blocks / each, zero, spec)[0]).mul_(each)
        return
    torch.div(blocks, each, out=target)
    if zero is None or spec.zero_step == 1:
        target.round_()
    if zero is not None:
        target.add_(zero.unsqueeze(-1))
    if spec.zero_step != 1:
        target.round_()
    target.clamp_(spec.code_low, spec.code_high)
    if zero is not None:
        target.sub_(zero.unsqueeze(-1))
    target.mul_(each)


def _gradients_(
    target: Tensor, gradient: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, *,
    ranges: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write the gradients of some blocks; returns, where asked for, those of their scales and zero points."""
    scaled = blocks / scale.unsqueeze(-1)
    if zero is not None or spec.format.kind != "int":
        steps, inside = _steps(scaled, zero, spec)
        torch.mul(gradient, inside, out=target)
        of_scale, of_zero = range_gradients(gradient, steps, scaled, inside, scale) if ranges else (None, None)
        return of_scale, None if zero is None else of_zero
    codes = scaled.round()
    steps = codes.clamp(spec.code_low, spec.code_high)
    kept = codes.eq_(steps)  # 1 inside the range, 0 outside, in the memory of the codes
    torch.mul(gradient, kept, out=target)
    return steps.sub_(scaled.mul_(kept)).mul_(gradient).sum(-1) if ranges else None, None


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, spec: QuantSpec, zero: bool) -> Tensor:
        return round_zero_point(values, spec).to(torch.float32) if zero else nearest_scale(values, spec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None
