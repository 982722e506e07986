"""Torch bodies of the ops that quantize weights: round to nearest, the error it makes, packing of codes.

The arithmetic is that of `core`; the ops exist so that a compiled body can do it at memory speed. They cover signed
integer formats with one scale per group of a row (a whole row is one group) stored as float32, float16 or e8m0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.core import (
    FORMATS,
    NumberFormat,
    PerGroup,
    QuantizedTensor,
    QuantSpec,
    pack,
    packed_width,
    quantize,
    quantize_blocks,
    to_blocks,
    unpack,
)
from narrowcast.core.granularity import from_blocks
from narrowcast.core.spec import SCALE_FORMATS
from narrowcast.kernels.op import FLOAT_TIERS, Op


def signed_spec(bits: int, group: int, symmetric: bool, scale_format: int) -> QuantSpec:
    """The spec of signed integers with one scale per group; `scale_format` is a position in SCALE_FORMATS."""
    return QuantSpec(FORMATS[f"int{bits}"], PerGroup(group), symmetric, SCALE_FORMATS[scale_format])


def quantize_weight(
    weight: Tensor, group: int, bits: int, symmetric: bool, scale_format: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest under the full range of every group: `core.quantize`.

    Args:
        weight: [N, K] float32, finite.
        group: columns that share a scale; the last group may be shorter.
        bits: of a signed integer format: 2..6 or 8.
        symmetric: without a zero point.
        scale_format: position in SCALE_FORMATS: 0 float32, 1 float16, 2 e8m0.

    Returns:
        codes [N, K] int8, scale [N, ceil(K / group)] float32 and zero_point of that shape int32, [0, 0] when symmetric.

    Raises:
        FormatError: the weight is not finite or a scale does not fit. The native body gives such groups a scale that
            is not finite instead, and leaves the message to this one.
    """
    record = quantize(weight, signed_spec(bits, group, symmetric, scale_format))
    assert record.scale is not None
    zero_point = record.zero_point
    return record.codes, record.scale, weight.new_empty((0, 0), dtype=torch.int32) if zero_point is None else zero_point


def encode_weight(weight: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, bits: int) -> Tensor:
    """Codes under given scales: `core.quantize_blocks`.

    Args:
        weight: [N, K] float32, finite.
        scale: [N, ceil(K / group)] float32 > 0.
        zero_point: of that shape, int32; None for symmetric codes.
        group: columns that share a scale.
        bits: of a signed integer format: 2..6 or 8.

    Returns:
        codes [N, K] int8.
    """
    spec = signed_spec(bits, group, zero_point is None, 0)
    codes = quantize_blocks(to_blocks(weight, spec.granularity), spec, scale, zero_point)
    return from_blocks(codes, spec.granularity, (weight.shape[0], weight.shape[1]))


def quantization_error(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    """[2] float64: sum of weight^2 and sum of (weight - decoded)^2; their order of summation is not fixed.

    Args:
        weight: [N, K] float32.
        codes: [N, K] int8.
        scale: [N, ceil(K / group)] float32.
        zero_point: of that shape, int32, or None.
        group: columns that share a scale.
    """
    decoded = QuantizedTensor(codes, scale, zero_point, signed_spec(8, group, zero_point is None, 0)).dequantize()
    exact = weight.to(torch.float64)
    return torch.stack([exact.square().sum(), (exact - decoded.to(torch.float64)).square().sum()])


def _number(bits: int, offset: int, is_signed: bool) -> NumberFormat:
    storage = torch.int8 if is_signed else torch.uint8
    return NumberFormat(f"{bits}-bit codes", "int", bits, offset, offset + 2**bits - 1, storage)


def pack_codes(codes: Tensor, bits: int, offset: int) -> Tensor:
    """Codes of fewer than 8 bits as bytes: `core.pack`.

    Args:
        codes: [N, K] int8 or uint8, each in offset..offset + 2^bits - 1.
        bits: 2..6.
        offset: the code whose field is 0, -128..0.

    Returns:
        [N, ceil(K * bits / 8)] uint8.

    Raises:
        RuntimeError: a code is outside its format (from this body its subclass FormatError).
    """
    return pack(codes, _number(bits, offset, codes.dtype == torch.int8))


def unpack_codes(packed: Tensor, bits: int, offset: int, columns: int, is_signed: bool) -> Tensor:
    """The inverse of `pack_codes`: `core.unpack`.

    Args:
        packed: [N, ceil(columns * bits / 8)] uint8.
        bits: 2..6.
        offset: the code whose field is 0.
        columns: codes in a row.
        is_signed: whether the codes are int8, else uint8.
    """
    return unpack(packed, _number(bits, offset, is_signed), columns)


def _fake_quantize(
    weight: Tensor, group: int, bits: int, symmetric: bool, scale_format: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (weight.shape[0], -(-weight.shape[1] // group))
    zero_point = weight.new_empty((0, 0) if symmetric else shape, dtype=torch.int32)
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(shape), zero_point


def _fake_encode(weight: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, bits: int) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.int8)


def _fake_error(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    return weight.new_empty(2, dtype=torch.float64)


def _fake_pack(codes: Tensor, bits: int, offset: int) -> Tensor:
    return codes.new_empty((codes.shape[0], packed_width(codes.shape[1], bits)), dtype=torch.uint8)


def _fake_unpack(packed: Tensor, bits: int, offset: int, columns: int, is_signed: bool) -> Tensor:
    return packed.new_empty((packed.shape[0], columns), dtype=torch.int8 if is_signed else torch.uint8)


OPS = (
    Op(
        "quantize_weight",
        "(Tensor weight, int group, int bits, bool symmetric, int scale_format) -> (Tensor, Tensor, Tensor)",
        quantize_weight,
        _fake_quantize,
        FLOAT_TIERS,
    ),
    Op(
        "encode_weight",
        "(Tensor weight, Tensor scale, Tensor? zero_point, int group, int bits) -> Tensor",
        encode_weight,
        _fake_encode,
        FLOAT_TIERS,
    ),
    Op(
        "quantization_error",
        "(Tensor weight, Tensor codes, Tensor scale, Tensor? zero_point, int group) -> Tensor",
        quantization_error,
        _fake_error,
        FLOAT_TIERS,
    ),
    Op("pack_codes", "(Tensor codes, int bits, int offset) -> Tensor", pack_codes, _fake_pack, FLOAT_TIERS),
    Op(
        "unpack_codes",
        "(Tensor packed, int bits, int offset, int columns, bool is_signed) -> Tensor",
        unpack_codes,
        _fake_unpack,
        FLOAT_TIERS,
    ),
)
