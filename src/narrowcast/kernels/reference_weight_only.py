"""Torch bodies of the ops that read stored weights of any format: dequantize, embedding rows, linear on float inputs.

A stored weight is packed fields or bytes, one scale per group of a row, perhaps zero points, perhaps a table of levels:

    value = (level[field] where there are levels, else field - zero_point) * scale

A field is the unsigned number in the bits of a code; of a signed byte it is code + 128, of a packed integer code - low.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.core import FORMATS
from narrowcast.kernels.op import FLOAT_TIERS, Op
from narrowcast.kernels.reference_encode import unpack_codes
from narrowcast.kernels.reference_linear import FUSED

_STORED = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? levels"


def dequantize_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, levels: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    """Float32 values of a stored weight.

    Args:
        codes:      [N, ceil(columns * bits / 8)] uint8, or int8 where `bits` is 8 and codes are signed.
        scale:      [N, ceil(columns / group)] or one row for all; float32, float16, or uint8 for e8m0.
        zero_point: shape of the scales, the field of 0.0, uint8, or float16 where it lies between fields; None for
            2^(bits - 1).
        levels:     the value of every field, float32: [2^bits], or [N, groups, 2^bits] for levels of every group's own;
            None for integers.
        bits:       2..6 or 8.
        group:      columns per scale, > 0.
        columns:    K.

    Returns:
        [N, columns] float32.
    """
    if bits == 8:
        fields = codes.to(torch.int32) + (128 if codes.dtype == torch.int8 else 0)
    else:
        fields = unpack_codes(codes, bits, 0, columns, False).to(torch.int32)
    factors = FORMATS["e8m0"].decode(scale) if scale.dtype == torch.uint8 else scale.float()
    if levels is not None and levels.dim() == 3:
        values = _own_levels(levels, fields, group)
    elif levels is not None:
        values = levels[fields]
    elif zero_point is None:
        values = (fields - 2 ** (bits - 1)).float()
    else:
        values = fields.float() - _per_column(zero_point.float(), group, columns)
    return values * _per_column(factors, group, columns)


def _own_levels(levels: Tensor, fields: Tensor, group: int) -> Tensor:
    which = torch.arange(fields.shape[1], device=fields.device) // group
    return levels.flatten(1).gather(1, which * levels.shape[2] + fields)


def _per_column(per_group: Tensor, group: int, columns: int) -> Tensor:
    return per_group.repeat_interleave(min(group, max(columns, 1)), dim=1)[:, :columns]


def linear_weight_only(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    fused: str = "none",
) -> Tensor:
    """Float inputs times a stored weight, products and sums in float32.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        codes: a stored weight [N, K], see `dequantize_weight`; so are the next three.
        scale: its scales.
        zero_point: its zero points or None.
        levels: its levels or None.
        bias: [N] float or None.
        bits: of its codes.
        group: columns per scale.
        fused: the activation function behind the bias, a name in FUSED.

    Returns:
        [..., N] in x's dtype. The order of the sums is not fixed. For bfloat16 inputs a native body may round the
        weights to bfloat16 too.
    """
    weight = dequantize_weight(codes, scale, zero_point, levels, bits, group, x.shape[-1])
    return FUSED[fused](functional.linear(x.float(), weight, None if bias is None else bias.float())).to(x.dtype)


def _fake_dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, levels: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    return codes.new_empty((codes.shape[0], columns), dtype=torch.float32)


def _fake_linear(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


OPS = (
    Op(
        "dequantize_weight",
        f"({_STORED}, int bits, int group, int columns) -> Tensor",
        dequantize_weight,
        _fake_dequantize,
        FLOAT_TIERS,
    ),
    Op(
        "linear_weight_only",
        f"(Tensor x, {_STORED}, Tensor? bias, int bits, int group, str fused='none') -> Tensor",
        linear_weight_only,
        _fake_linear,
        FLOAT_TIERS,
    ),
)
