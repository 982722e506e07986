"""Pure torch bodies of the linear ops: int8 weights per channel, and packed weights of 2 to 8 bits in groups.

They define what the native kernels must compute, bit for bit, but for the fused activation functions, which the kernels
approximate to 2e-7 + 1e-6 * |y|.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.core import FORMATS, unpack
from narrowcast.kernels.interleave import is_interleaved, restore, restore_groups
from narrowcast.kernels.op import Op
from narrowcast.kernels.reference import (
    add_bias,
    finite_rows,
    integer_product,
    quantize_rows,
    quantize_rows_asymmetric,
    round_to,
)

FUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}
"""Activation functions that the linear ops apply in float32, before the result is rounded to the output's dtype."""

LEVEL_FACTORS = {"nf4": 127.0, "fp4_e2m1": 2.0}
"""What the levels of a codebook are multiplied with to be small integers: exact for fp4, nf4 is then rounded."""

LOW_BIT_FORMATS = ("int2", "int3", "int4", "uint4", "int5", "int6", "int8", *LEVEL_FACTORS)
"""Weight formats of the op."""


def apply_fused(op: str, rows: Tensor, fused: str) -> Tensor:
    """The activation function called `fused` of float32 rows."""
    if fused not in FUSED:
        raise RuntimeError(f"narrowcast.{op}: fused '{fused}' is not known; use {', '.join(FUSED)}")
    return FUSED[fused](rows)


def input_group_of(group: int, columns: int) -> int:
    """Inputs that share a scale, for weights of which `group` of `columns` share one.

    As many as the weights', but at least 32 and at most 128; all where a whole row of weights shares a scale.
    """
    return columns if group >= columns else max(32, math.gcd(group, 128))


def block_of(group: int, input_group: int, columns: int) -> int:
    """Products that are summed in integers before they are scaled: all, or what divides both groups, at most 128."""
    sizes = [size for size in (group, input_group) if size < columns]
    return math.gcd(128, *sizes) if sizes else max(columns, 1)


def _levels_and_scale(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, name: str, group: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The integers [N, K] that the kernels multiply and the scales [N, groups], from either layout."""
    if not is_interleaved(weight):
        return integer_levels(weight, zero_point, name, group, shape[1]), scale
    number = FORMATS[name]
    codes = restore(weight, *shape)
    if number.kind == "int" and number.bits < 8:
        codes = (codes.to(torch.int16) + int(number.low)).to(number.storage)
    zero_point = None if zero_point is None else restore_groups(zero_point, shape[0])
    return levels_of_codes(codes, zero_point, name, group), restore_groups(scale, shape[0])


def integer_levels(weight: Tensor, zero_point: Tensor | None, name: str, group: int, columns: int) -> Tensor:
    """Signed integers [N, columns] that the kernels multiply: code minus zero point, or a rounded level."""
    number = FORMATS[name]
    codes = unpack(weight, number, columns) if number.bits < 8 else weight
    return levels_of_codes(codes, zero_point, name, group)


def levels_of_codes(codes: Tensor, zero_point: Tensor | None, name: str, group: int) -> Tensor:
    """The same from codes [N, columns] that are not packed."""
    number = FORMATS[name]
    if name in LEVEL_FACTORS:
        return torch.round(number.decode(codes) * LEVEL_FACTORS[name]).to(torch.int16)
    levels = codes.to(torch.int16)
    if zero_point is None:
        return levels
    zero = (zero_point & (2**number.bits - 1)).to(torch.int16) + int(number.low)
    return levels - zero.repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def linear_lowbit_dynamic(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    format: str, group: int, input_group: int, fused: str = "none", columns: int = 0,
) -> Tensor:  # fmt: skip
    """Linear layer with packed weights and activations quantized to int8 per token and group as they come.

    Args:
        x:           [..., K] float32, bfloat16 or float16.
        weight:      [N, ceil(K * bits / 8)] uint8 as `narrowcast.core.pack` makes it; int8 codes [N, K] for "int8".
        scale:       [N, ceil(K / group)] float16 or float32.
        zero_point:  [N, ceil(K / group)] uint8, the field that means 0.0 (its low `bits` bits count); None where the
            format is symmetric. int8 and the codebooks take none.
        bias:        [N] float, or None.
        format:      a name in LOW_BIT_FORMATS.
        group:       weights that share a scale: a multiple of 16, or at least K.
        input_group: inputs that share a scale: likewise.
        fused:       a name in FUSED.
        columns:     N where weight, scale and zero_point are interleaved (`narrowcast.kernels.interleave`), else 0.

    Returns:
        y: [..., N] in x's dtype: fused of the float32 sum, over blocks in ascending order, of
            float(codes . levels) * weight scale * activation scale, plus bias.

    Raises:
        RuntimeError: x holds a NaN or an infinity, or an argument is not what is described here.
    """
    op = "linear_lowbit_dynamic"
    if format not in LOW_BIT_FORMATS:
        raise RuntimeError(f"narrowcast.{op}: format '{format}' is not known; use {', '.join(LOW_BIT_FORMATS)}")
    rows = finite_rows(op, x)
    depth = rows.shape[1]
    levels, scale = _levels_and_scale(weight, scale, zero_point, format, group, (columns, depth))
    factor = torch.tensor(1.0, device=x.device) / LEVEL_FACTORS.get(format, 1.0)
    scales = scale.float() * factor
    total = torch.zeros(rows.shape[0], levels.shape[0], dtype=torch.float32, device=x.device)
    block = block_of(group, input_group, depth)
    for begin in range(0, depth, input_group):
        codes, row_scale = quantize_rows(rows[:, begin : begin + input_group])
        for start in range(0, codes.shape[1], block):
            part = codes[:, start : start + block]
            product = integer_product(part, levels[:, begin + start : begin + start + part.shape[1]]).float()
            total = total + (product * scales[:, (begin + start) // group]) * row_scale[:, None]
    return round_to(apply_fused(op, add_bias(total, bias), fused), x)


def _int8_rows(weight: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """An int8 weight [N, K] from either layout."""
    return restore(weight, scale.shape[0], rows.shape[1]) if is_interleaved(weight) else weight


def linear_int8_dynamic(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    symmetric: bool = True,
    fused: str = "none",
) -> Tensor:
    """Linear layer with int8 weights and activations quantized per token as they come.

    Args:
        x:          [..., K] float32, bfloat16 or float16.
        weight:     [N, K] int8, or the same interleaved (`narrowcast.kernels.interleave`).
        scale:      [N] float32, weight units per code step.
        weight_sum: [N] int32, the sum of each weight row.
        bias:       [N] float, or None.
        symmetric:  int8 codes -127..127 of each token, or uint8 codes with a zero point of its own.
        fused:      a name in FUSED: the activation function of the result.

    Returns:
        y: [..., N] in x's dtype: float(codes . weight - zero point * weight_sum) * (row scale * scale) + bias, fused.

    Raises:
        RuntimeError: x holds a NaN or an infinity.
    """
    rows = finite_rows("linear_int8_dynamic", x)
    weight = _int8_rows(weight, scale, rows)
    if symmetric:
        codes, row_scale = quantize_rows(rows)
        product = integer_product(codes, weight)
    else:
        codes, row_scale, zero_point = quantize_rows_asymmetric(rows)
        product = integer_product(codes, weight) - zero_point[:, None] * weight_sum[None, :]
    rows = add_bias(product.float() * (row_scale[:, None] * scale[None, :]), bias)
    return round_to(apply_fused("linear_int8_dynamic", rows, fused), x)


def linear_int8_static(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_sum: Tensor,
    bias: Tensor | None,
    input_inverse: Tensor,
    input_zero_point: Tensor,
    fused: str = "none",
) -> Tensor:
    """Linear layer with int8 weights and activations quantized to uint8 with ranges known beforehand.

    Args:
        x:                [..., K] float32, bfloat16 or float16.
        weight:           [N, K] int8, or the same interleaved (`narrowcast.kernels.interleave`).
        scale:            [N] float32, output units per integer: weight scale times input scale. Where every channel has
            its own input scale, the caller has folded those into the weight, and this is the weight scale alone.
        zero_sum:         [N] int32, the sum over k of input_zero_point[k] * weight[n, k].
        bias:             [N] float, or None.
        input_inverse:    [1] or [K] float32 > 0, code steps per activation unit: 1 / input scale in float32.
        input_zero_point: as long as input_inverse, int32 in 0..255, the code that means 0.0.
        fused:            a name in FUSED: the activation function of the result.

    Returns:
        y: [..., N] in x's dtype: float(codes . weight - zero_sum) * scale + bias, fused.

    Raises:
        RuntimeError: x holds a NaN or an infinity.
    """
    rows = finite_rows("linear_int8_static", x)
    weight = _int8_rows(weight, scale, rows)
    codes = (torch.round(rows * input_inverse) + input_zero_point).clamp(0, 255)
    product = integer_product(codes, weight) - zero_sum
    rows = add_bias(product.float() * scale[None, :], bias)
    return round_to(apply_fused("linear_int8_static", rows, fused), x)


def _fake_int8(x: Tensor, weight: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


def _fake_lowbit(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    format: str, group: int, input_group: int, fused: str = "none", columns: int = 0,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], columns if is_interleaved(weight) else weight.shape[0]))


_INT8_INTERLEAVED = ("avx2", "avxvnni", "avx512vnni")
# neoni8mm multiplies many rows by SMMLA, from pairs of rows that this layout does not have
_LOW_BIT_INTERLEAVED = ("avx2", "avxvnni", "avx512vnni", "neondot")

OPS = (
    Op(
        "linear_int8_dynamic",
        "(Tensor x, Tensor weight, Tensor scale, Tensor weight_sum, Tensor? bias, bool symmetric=True,"
        ' str fused="none") -> Tensor',
        linear_int8_dynamic,
        _fake_int8,
        interleaved=_INT8_INTERLEAVED,
    ),
    Op(
        "linear_int8_static",
        "(Tensor x, Tensor weight, Tensor scale, Tensor zero_sum, Tensor? bias, Tensor input_inverse,"
        ' Tensor input_zero_point, str fused="none") -> Tensor',
        linear_int8_static,
        _fake_int8,
        interleaved=_INT8_INTERLEAVED,
    ),
    Op(
        "linear_lowbit_dynamic",
        "(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, str format, int group,"
        ' int input_group, str fused="none", int columns=0) -> Tensor',
        linear_lowbit_dynamic,
        _fake_lowbit,
        interleaved=_LOW_BIT_INTERLEAVED,
    ),
)
