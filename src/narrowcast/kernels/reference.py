"""Pure torch bodies of the linear and dequantize ops: they define what the native kernels must compute, bit for bit.

Integers are multiplied in float64, which is exact below 2**53 and much faster in torch than int64. Every float step
is one float32 operation in a fixed order (no fused multiply-add), so that all tiers round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.kernels.op import Op

ACTIVATION_GROUP = 32
"""Activations of the int4 ops have one scale per token and 32 input channels."""

SMALLEST_RANGE = 2.0**-100
"""A row (or group) whose largest magnitude is below this counts as all zero: 127 / range would overflow."""


def check_finite(op: str, rows: Tensor) -> None:
    """Raise if a row of `rows` [M, K] has a NaN or an infinity; the message names the first such row."""
    bad = ~torch.isfinite(rows).all(dim=1)
    if bool(bad.any()):
        raise RuntimeError(f"narrowcast.{op}: Non-finite value in row {int(bad.nonzero()[0])} of x")


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row.

    Args:
        rows: [M, K] float32, finite.

    Returns:
        codes: [M, K] float32 holding integers in -127..127.
        scale: [M] float32, absmax / 127; 1.0 where the row counts as zero.
    """
    if rows.shape[1] == 0:
        return rows, torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)
    absmax = rows.abs().amax(dim=1)
    zero = absmax < SMALLEST_RANGE
    # A division of two tensors: torch computes `127.0 / tensor` as reciprocal times 127, which rounds twice.
    largest = torch.tensor(127.0, dtype=torch.float32, device=rows.device)
    inverse = torch.where(zero, 0.0, torch.div(largest, torch.where(zero, 1.0, absmax)))
    scale = torch.where(zero, 1.0, torch.div(absmax, largest))
    return torch.round(rows * inverse[:, None]).clamp(-127, 127), scale


def quantize_rows_asymmetric(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric uint8 codes of each row; its range is widened to contain 0.

    Args:
        rows: [M, K] float32, finite.

    Returns:
        codes: [M, K] float32 holding integers in 0..255.
        scale: [M] float32, (high - low) / 255; 1.0 where the row counts as zero.
        zero_point: [M] int32 in 0..255, the code of 0.0.
    """
    if rows.shape[1] == 0:
        return rows, rows.new_ones(rows.shape[0]), rows.new_zeros(rows.shape[0], dtype=torch.int32)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    zero = torch.maximum(-low, high) < SMALLEST_RANGE
    steps = torch.tensor(255.0, dtype=torch.float32, device=rows.device)
    # divided before subtracted: high - low may overflow where neither bound does
    scale = torch.where(zero, 1.0, torch.div(high, steps) - torch.div(low, steps))
    inverse = torch.where(zero, 0.0, torch.div(torch.ones_like(scale), scale))
    zero_point = torch.round(-low * inverse).clamp(max=255)
    shifted = (rows * inverse[:, None]).clamp(-zero_point[:, None], 255 - zero_point[:, None])
    return torch.round(shifted) + zero_point[:, None], scale, zero_point.to(torch.int32)


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact codes [M, K] times weight [N, K] transposed, as int32 [M, N]."""
    return torch.matmul(codes.double(), weight.double().t()).to(torch.int32)


def _finish(rows: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias in float32, round to x's dtype and give the result x's leading dimensions."""
    if bias is not None:
        rows = rows + bias.float()
    return rows.to(x.dtype).reshape(*x.shape[:-1], rows.shape[1])


def _rows(op: str, x: Tensor) -> Tensor:
    """X as finite float32 rows [M, K]."""
    rows = x.float().reshape(x[..., 0].numel() if x.shape[-1] else x.shape[:-1].numel(), x.shape[-1])
    check_finite(op, rows)
    return rows


def linear_int8_dynamic(
    x: Tensor, weight: Tensor, scale: Tensor, weight_sum: Tensor, bias: Tensor | None, symmetric: bool = True
) -> Tensor:
    """Linear layer with int8 weights and activations quantized per token as they come.

    Args:
        x:          [..., K] float32, bfloat16 or float16.
        weight:     [N, K] int8.
        scale:      [N] float32, weight units per code step.
        weight_sum: [N] int32, the sum of each weight row.
        bias:       [N] float, or None.
        symmetric:  int8 codes -127..127 of each token, or uint8 codes with a zero point of its own.

    Returns:
        y: [..., N] in x's dtype: float(codes . weight - zero point * weight_sum) * (row scale * scale) + bias.

    Raises:
        RuntimeError: x holds a NaN or an infinity.
    """
    rows = _rows("linear_int8_dynamic", x)
    if symmetric:
        codes, row_scale = quantize_rows(rows)
        product = integer_product(codes, weight)
    else:
        codes, row_scale, zero_point = quantize_rows_asymmetric(rows)
        product = integer_product(codes, weight) - zero_point[:, None] * weight_sum[None, :]
    return _finish(product.float() * (row_scale[:, None] * scale[None, :]), x, bias)


def linear_int8_static(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_sum: Tensor,
    bias: Tensor | None,
    input_inverse: Tensor,
    input_zero_point: Tensor,
) -> Tensor:
    """Linear layer with int8 weights and activations quantized to uint8 with ranges known beforehand.

    Args:
        x:                [..., K] float32, bfloat16 or float16.
        weight:           [N, K] int8.
        scale:            [N] float32, output units per integer: weight scale times input scale. Where every channel has
            its own input scale, the caller has folded those into the weight, and this is the weight scale alone.
        zero_sum:         [N] int32, the sum over k of input_zero_point[k] * weight[n, k].
        bias:             [N] float, or None.
        input_inverse:    [1] or [K] float32 > 0, code steps per activation unit: 1 / input scale in float32.
        input_zero_point: as long as input_inverse, int32 in 0..255, the code that means 0.0.

    Returns:
        y: [..., N] in x's dtype: float(codes . weight - zero_sum) * scale + bias.

    Raises:
        RuntimeError: x holds a NaN or an infinity.
    """
    rows = _rows("linear_int8_static", x)
    codes = (torch.round(rows * input_inverse) + input_zero_point).clamp(0, 255)
    product = integer_product(codes, weight) - zero_sum
    return _finish(product.float() * scale[None, :], x, bias)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Unsigned nibbles [N, columns] of packed rows [N, ceil(columns / 2)]: the low nibble comes first."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    return nibbles.reshape(packed.shape[0], 2 * packed.shape[1])[:, :columns]


def _centred_int4(weight: Tensor, zero_point: Tensor | None, group: int, columns: int) -> Tensor:
    """Int16 [N, columns] nibble minus its zero point."""
    nibbles = unpack_nibbles(weight, columns).to(torch.int16)
    if zero_point is None:
        return nibbles - 8
    return nibbles - zero_point.to(torch.int16).repeat_interleave(group, dim=1)[:, :columns]


def linear_int4_dynamic(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    """Linear layer with packed int4 weights and activations quantized to int8 per token and group of 32.

    Args:
        x:          [..., K] float32, bfloat16 or float16.
        weight:     [N, ceil(K / 2)] uint8, two unsigned nibbles per byte, the first in the low half.
        scale:      [N, ceil(K / group)] float16, weight units per code step.
        zero_point: [N, ceil(K / group)] uint8 in 0..15, the nibble that means 0.0; None means 8 everywhere.
        bias:       [N] float, or None.
        group:      a multiple of 32, or K.

    Returns:
        y: [..., N] in x's dtype: the float32 sum, over groups of 32 in ascending order, of
            float(codes . (nibble - zero_point)) * (activation scale * weight scale), plus bias.

    Raises:
        RuntimeError: x holds a NaN or an infinity.
    """
    rows = _rows("linear_int4_dynamic", x)
    depth = rows.shape[1]
    centred = _centred_int4(weight, zero_point, group, depth)
    total = torch.zeros(rows.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for start in range(0, depth, ACTIVATION_GROUP):
        end = min(start + ACTIVATION_GROUP, depth)
        codes, row_scale = quantize_rows(rows[:, start:end])
        product = integer_product(codes, centred[:, start:end]).float()
        total = total + product * (row_scale[:, None] * scale[:, start // group].float()[None, :])
    return _finish(total, x, bias)


def _fake_linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


OPS = (
    Op(
        "linear_int8_dynamic",
        "(Tensor x, Tensor weight, Tensor scale, Tensor weight_sum, Tensor? bias, bool symmetric=True) -> Tensor",
        linear_int8_dynamic,
        _fake_linear,
    ),
    Op(
        "linear_int8_static",
        "(Tensor x, Tensor weight, Tensor scale, Tensor zero_sum, Tensor? bias, Tensor input_inverse,"
        " Tensor input_zero_point) -> Tensor",
        linear_int8_static,
        _fake_linear,
    ),
    Op(
        "linear_int4_dynamic",
        "(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int group) -> Tensor",
        linear_int4_dynamic,
        _fake_linear,
    ),
)
