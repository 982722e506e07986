"""The equation `value = scale * (code - zero_point)`: choosing scales, quantizing, dequantizing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from narrowcast.core.codebook import learn_levels, nearest_levels
from narrowcast.core.formats import FORMATS, NumberFormat, check_finite, first_index
from narrowcast.core.granularity import from_blocks, to_blocks
from narrowcast.core.spec import SCALE_FORMATS, QuantSpec
from narrowcast.core.super_blocks import split_super_scale, spread_super_scale
from narrowcast.core.tensor import QuantizedTensor, dequantize_blocks
from narrowcast.errors import FormatError

# The smallest scale of each scale format. In float32 and what is derived from it that is the smallest normal number:
# a scale below would lose its own precision, and value / scale could overflow.
_SMALLEST = {"fp32": 2.0**-126, "fp16": 2.0**-24, "e8m0": 2.0**-126, "int8": 2.0**-126, "k6": 2.0**-24}
_PLAIN_SCALES = [name for name in SCALE_FORMATS if name in FORMATS and name != "int8"]
_LARGEST = {"int8": FORMATS["fp32"].high, "k6": 63 * 65504.0} | {name: FORMATS[name].high for name in _PLAIN_SCALES}


def choose_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that map the range [low, high] of each block onto the codes of `spec`.

    Args:
        low:  [block_rows, block_columns] smallest value per block, in weight units.
        high: [block_rows, block_columns] largest value per block, in weight units; high >= low.
        spec: target format; decides the code range and whether a zero point exists.

    Returns:
        scale:      [block_rows, block_columns] float32, weight units per code step, > 0 (1.0 for an all-zero block,
            with 8-bit scales and in super-blocks the smallest), already rounded to the scale format.
        zero_point: [block_rows, block_columns] the code that means 0.0, int32, or float32 in steps of `spec.zero_step`
            where that is below 1; None when symmetric.

    Raises:
        FormatError: a bound is not finite or low > high, the scale does not fit its format, or a code would mean a
            number beyond float32; the message names the first bad block.

    Source:
        Jacob et al. 2018, arXiv:1712.05877, eq. 1. Differs: the range is widened to contain 0, so 0.0 is exact.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    _check_range(low, high)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / float(spec.format.high)
    else:
        # each bound by itself: high - low overflows float32 where neither bound does
        scale = high / (spec.code_high - spec.code_low) - low / (spec.code_high - spec.code_low)
    # where scales hang together a scale of 1 could be the largest and leave the others no bits
    of_zeros = _SMALLEST[spec.scale_format] if spec.scale_format in ("int8", "k6") else 1.0
    scale = torch.where((low == 0) & (high == 0), of_zeros, scale)
    scale = round_scale(scale, spec)
    zero_point = None
    if not spec.symmetric:
        zero_point = round_zero_point(spec.code_low - low / scale, spec)
    _check_reach(torch.stack([low, high], dim=-1), spec, scale, zero_point)
    return scale, zero_point


def round_zero_point(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Zero points [...] float32 rounded to the nearest that `spec` can hold: int32, or float32 between codes."""
    if spec.zero_step == 1:
        return zero_point.round().clamp(spec.code_low, spec.zero_high).to(torch.int32)
    rounded = (zero_point / spec.zero_step).round() * spec.zero_step
    return rounded.clamp(spec.code_low, spec.zero_high) + 0.0  # no -0.0: records are compared bit for bit


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Scales rounded to the nearest that the scale format of `spec` can hold, as float32 and never zero.

    Rounding a rounded scale changes nothing. Two formats do not round to the nearest: "e8m0" rounds up to the next
    power of two, and "fp16" rounds up below 2^-14, where its steps are so coarse that the nearest scale could cut
    a block's largest value by a third. "k6" gives the largest scale of every 256 columns the 6-bit code 63, unless all
    are multiples of one float16 number already.

    Args:
        scale: [block_rows, block_columns] float32, > 0.
        spec: its `scale_format` decides.

    Raises:
        FormatError: a scale is larger than the format's largest number; the message names the first bad block.

    Source:
        "int8" is the double quantization of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3). Differs: one
        outer scale per row of blocks, a bfloat16 number, so that outer * code is exact in float32. "e8m0": OCP MX
        1.0, section 6.3. Differs: OCP rounds down and clips the largest values of a block.
    """
    name = spec.scale_format
    rounded = nearest_scale(scale, spec)
    bad = ~(rounded <= _LARGEST[name])
    if bool(bad.any()):
        where = first_index(bad)
        raise FormatError(
            f"block {where} of {spec}: its scale {float(scale[where]):.6g} does not fit {name} "
            f"(largest {_LARGEST[name]:.6g}); write '/scale:fp32'"
        )
    return rounded


def nearest_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """What `round_scale` gives, unchecked: a scale that does not fit its format comes out infinite, NaN stays NaN."""
    name = spec.scale_format
    scale = scale.to(torch.float32).clamp(min=_SMALLEST[name])
    if name == "fp16":
        upwards = (scale * 2.0**24).ceil() * 2.0**-24  # float16 numbers below 2^-14 are the multiples of 2^-24
        return torch.where(scale < 2.0**-14, upwards, scale.to(torch.float16).to(torch.float32))
    if name == "e8m0":
        mantissa, exponent = torch.frexp(scale)
        return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(torch.int32))
    if name == "int8":
        codes, outer = split_int8_scale(scale)
        return outer * codes.to(torch.float32)
    if name == "k6":
        codes, outer = split_super_scale(scale, spec)
        return codes.to(torch.float32) * spread_super_scale(outer, spec, scale.shape[1])
    return scale


def split_int8_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes and one bfloat16 outer scale per row: the nearest `outer * code`, code in 1..127.

    Args:
        scale: [block_rows, block_columns] float32, > 0.

    Returns:
        codes: [block_rows, block_columns] uint8.
        outer: [block_rows, 1] float32 with bfloat16 values; splitting a rounded scale again gives the same parts.
    """
    if scale.numel() == 0:
        return scale.to(torch.uint8), scale[:, :1]
    outer = (scale.amax(1, keepdim=True) / 127).to(torch.bfloat16).to(torch.float32).clamp(min=2.0**-126)
    return (scale / outer).round().clamp(1, 127).to(torch.uint8), outer


def quantize(
    values: Tensor, spec: QuantSpec, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> QuantizedTensor:
    """Nearest codes of a matrix, ties to even.

    Args:
        values: [rows, columns] float, finite.
        spec: target format.
        scale: [block_rows, block_columns] float32 > 0; None takes the range of each block, unclipped.
        zero_point: [block_rows, block_columns] int32, or float32 where `spec.zero_step` is below 1; required with
            `scale` when `spec` is asymmetric.

    Returns:
        The record; learned levels are those of `learn_levels` with all values alike.

    Raises:
        FormatError: values are not a finite float matrix or, in a format without scales, are beyond its largest
            number; or scale and zero point do not belong to `spec` and the shape of `values`.
    """
    if values.dim() != 2 or not values.is_floating_point():
        raise FormatError(
            f"quantize takes a float matrix [rows, columns], got {values.dtype} of shape {tuple(values.shape)}; "
            "convert or reshape it first"
        )
    check_finite(values, "quantize")
    if spec.format.learned:
        return quantize_learned(values, spec)
    if not spec.format.scaled:
        _check_fits(values, spec.format)
        return QuantizedTensor(spec.format.encode(values), None, None, spec)
    blocks = to_blocks(values.to(torch.float32), spec.granularity)
    if scale is None:
        scale, zero_point = choose_scale(*block_range(blocks), spec)
    else:
        _check_scale(scale, zero_point, blocks, spec)
    codes = quantize_blocks(blocks, spec, scale, zero_point)
    shape = (values.shape[0], values.shape[1])
    return QuantizedTensor(from_blocks(codes, spec.granularity, shape), scale, zero_point, spec)


def quantize_learned(values: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> QuantizedTensor:
    """Nearest learned levels of a matrix.

    Args:
        values: [rows, columns] float, finite.
        spec: a format with learned levels.
        importance: [columns] float, > 0: what the squared error of each column counts; None for 1 everywhere.

    Raises:
        FormatError: a value is beyond float16, which holds the levels.
    """
    values = values.to(torch.float32)
    number, shape = spec.format, (values.shape[0], values.shape[1])
    _check_fits(values, replace(number, storage=torch.float16))
    weights = torch.ones(1, shape[1], device=values.device) if importance is None else importance[None]
    # a block that reaches over the edge is filled with zeros, which count nothing
    counts = to_blocks(weights.to(torch.float32).expand(shape), spec.granularity)
    blocks = to_blocks(values, spec.granularity)
    levels = learn_levels(blocks, counts, number.bits)
    codes = from_blocks(nearest_levels(blocks, levels), spec.granularity, shape)
    return QuantizedTensor(codes, None, None, spec, levels)


def quantize_blocks(blocks: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Codes of values in block view, clamped to the codes in use; the arithmetic under `quantize`.

    Args:
        blocks: [block_rows, block_columns, elements] float32, finite.
        spec: target format, one with scales.
        scale: [block_rows, block_columns] float32 > 0.
        zero_point: [block_rows, block_columns] int32 or float32; None when symmetric.

    Returns:
        codes: [block_rows, block_columns, elements] in the format's storage dtype.
    """
    scaled = blocks / scale.unsqueeze(-1)
    if spec.format.kind != "int":
        return spec.format.encode(scaled.clamp_(spec.format.low, spec.format.high))
    if zero_point is not None and zero_point.is_floating_point():
        scaled += zero_point.unsqueeze(-1)  # between codes, so it has a part in the rounding
        zero_point = None
    scaled.round_()
    if zero_point is not None:
        scaled += zero_point.unsqueeze(-1)
    return scaled.clamp_(spec.code_low, spec.code_high).to(spec.format.storage)


def block_range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every block, each [block_rows, block_columns]."""
    if blocks.numel() == 0:
        empty = blocks.new_zeros(blocks.shape[:2])
        return empty, empty
    low, high = blocks.aminmax(dim=-1)
    return low, high


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """The float32 matrix that `tensor` stands for."""
    return tensor.dequantize()


def _check_range(low: Tensor, high: Tensor) -> None:
    bad = ~(torch.isfinite(low) & torch.isfinite(high)) | (low > high)
    if bool(bad.any()):
        where = first_index(bad)
        raise FormatError(
            f"block {where}: the range [{float(low[where])}, {float(high[where])}] is not finite or is reversed; "
            "a scale needs finite float32 bounds with low <= high"
        )


def _check_reach(ends: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> None:
    """Rounding the scale or the zero point can push the ends [..., 2] of a block beyond the last float32."""
    codes = quantize_blocks(ends, spec, scale, zero_point)
    bad = ~torch.isfinite(dequantize_blocks(codes, spec, scale, zero_point)).all(-1)
    if bool(bad.any()):
        raise FormatError(
            f"block {first_index(bad)} of {spec} has values so near the largest float32 that a code would mean "
            "infinity; scale the values down"
        )


def _check_scale(scale: Tensor, zero_point: Tensor | None, blocks: Tensor, spec: QuantSpec) -> None:
    """A caller's scales: one per block, each a number of the scale format, so that saving them changes nothing."""
    parts = [scale] if zero_point is None else [scale, zero_point]
    if any(part.shape != blocks.shape[:2] for part in parts) or (zero_point is None) != spec.symmetric:
        raise FormatError(
            f"{spec}: needs scales of shape {tuple(blocks.shape[:2])} and {'no' if spec.symmetric else 'as many'} zero "
            f"points; got shapes {[tuple(part.shape) for part in parts]}"
        )
    bad = round_scale(scale, spec) != scale
    if bool(bad.any()):
        where = first_index(bad)
        raise FormatError(
            f"{spec}: the scale {float(scale[where])!r} of block {where} is not a positive {spec.scale_format} number; "
            "pass it through round_scale"
        )
    if zero_point is None:
        return
    if bool(((zero_point < spec.code_low) | (zero_point > spec.zero_high)).any()):
        raise FormatError(f"{spec}: a zero point is outside the codes {spec.code_low}..{spec.zero_high:g}")
    if bool((round_zero_point(zero_point.to(torch.float32), spec) != zero_point).any()):
        raise FormatError(f"{spec}: a zero point is no multiple of {spec.zero_step:g}; use round_zero_point")


def _check_fits(values: Tensor, number: NumberFormat) -> None:
    """No value is so large that it would round to infinity: that is no matter of precision, and never silent."""
    bad = torch.isinf(values.to(torch.float32).to(number.storage))
    if bool(bad.any()):
        where = first_index(bad)
        raise FormatError(
            f"element {where} is {float(values[where]):.6g}, beyond the largest {number.name} number "
            f"{number.high:.6g}; use a wider float, or a format with scales such as int8/channel"
        )
