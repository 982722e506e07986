"""Round to nearest and its error by the native ops where they cover the format, by `core` where they do not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import narrowcast.kernels  # noqa: F401  importing it defines torch.ops.narrowcast
from narrowcast.core import (
    SCALE_FORMATS,
    PerChannel,
    PerGroup,
    QuantizedTensor,
    QuantSpec,
    block_shape,
    quantize,
    sqnr_db,
)
from narrowcast.kernels.reference_search import search_weight

_LONGEST_BLOCK = 65536
# Scales this large may decode to infinity; `core` looks at every such block and names the one that does.
_NEAR_OVERFLOW = 2.0**100
_LARGEST_SCALE = {"fp32": _NEAR_OVERFLOW, "fp16": 65504.0, "e8m0": _NEAR_OVERFLOW}


def has_native_body(spec: QuantSpec) -> bool:
    """Whether the ops of kernels/reference_encode.py cover a format: signed integers, one scale per group of a row."""
    return (
        spec.format.kind == "int"
        and spec.format.low < 0
        and isinstance(spec.granularity, PerChannel | PerGroup)
        and spec.scale_format in _LARGEST_SCALE
    )


def round_to_nearest(
    weight: Tensor, spec: QuantSpec, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> QuantizedTensor:
    """`core.quantize`, the same bits, at memory speed where a native body exists.

    Args:
        weight: [out, in] float32, finite.
        spec: target format.
        scale: [block_rows, block_columns] float32, numbers of the scale format; None takes the full range.
        zero_point: of that shape, int32; required with `scale` when `spec` is asymmetric.

    Raises:
        FormatError: as `core.quantize` does.
    """
    if weight.device.type != "cpu" or not has_native_body(spec):
        return quantize(weight, spec, scale, zero_point)
    _, group = block_shape(spec.granularity, (weight.shape[0], weight.shape[1]))
    if scale is not None:
        codes = torch.ops.narrowcast.encode_weight(weight, scale, zero_point, group, spec.format.bits)
        return QuantizedTensor(codes, scale, zero_point, spec)
    codes, scale, zeros = torch.ops.narrowcast.quantize_weight(
        weight, group, spec.format.bits, spec.symmetric, SCALE_FORMATS.index(spec.scale_format)
    )
    assert scale is not None
    if scale.numel() and not float(scale.max()) <= _LARGEST_SCALE[spec.scale_format]:
        return quantize(weight, spec)  # for its error, or because it is large and still fits
    return QuantizedTensor(codes, scale, None if spec.symmetric else zeros, spec)


def search_range(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None, refinements: int
) -> tuple[Tensor, Tensor | None]:
    """The range of every block with the least squared error, see `kernels/reference_search.py`; the same bits natively.

    Args:
        weight: [out, in] float32, finite, not empty.
        spec: target format, one with scales.
        importance: [in] float32 >= 0; None for 1 everywhere.
        refinements: rounds of refinement after the grid.

    Returns:
        scale [block_rows, block_columns] float32 as it is stored; zero point of that shape as `spec` has it, or None.
    """
    _, group = block_shape(spec.granularity, (weight.shape[0], weight.shape[1]))
    # longer blocks are summed in pieces there; the full range's errors are raised there
    if weight.device.type != "cpu" or not has_native_body(spec) or group > _LONGEST_BLOCK:
        return search_weight(weight, spec, importance, refinements)
    scale, zero_point = torch.ops.narrowcast.search_range(
        weight, importance, group, spec.format.bits, spec.symmetric, SCALE_FORMATS.index(spec.scale_format), refinements
    )
    if not float(scale.max()) < _LARGEST_SCALE[spec.scale_format]:
        return search_weight(weight, spec, importance, refinements)
    return scale, None if spec.symmetric else zero_point


def weight_sqnr_db(weight: Tensor, record: QuantizedTensor) -> float:
    """Signal to quantization noise ratio of a weight in decibel; `core.sqnr_db` of the dequantized record.

    Args:
        weight: [out, in] float.
        record: its quantized form.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_native_body(record.spec):
        return sqnr_db(weight, record.dequantize())
    _, group = block_shape(record.spec.granularity, record.shape)
    error = torch.ops.narrowcast.quantization_error(weight, record.codes, record.scale, record.zero_point, group)
    signal, noise = (float(part) for part in error)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
