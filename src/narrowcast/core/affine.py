"""The equation `value = scale * (code - zero_point)`: choosing scales, quantizing, dequantizing."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.core.formats import FORMATS
from narrowcast.core.granularity import from_blocks, scale_shape, to_blocks
from narrowcast.core.spec import QuantSpec
from narrowcast.core.tensor import QuantizedTensor
from narrowcast.errors import FormatError

_SMALLEST = {"fp32": 2.0**-126, "fp16": 2.0**-24, "e8m0": 2.0**-126, "int8": 2.0**-126}


def choose_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that map the range [low, high] of each block onto the codes of `spec`.

    Args:
        low:  [block_rows, block_columns] smallest value per block, in weight units.
        high: [block_rows, block_columns] largest value per block, in weight units; high >= low.
        spec: target format; decides the code range and whether a zero point exists.

    Returns:
        scale:      [block_rows, block_columns] float32, weight units per code step, > 0 (1.0 for an all-zero block),
            already rounded to the scale format.
        zero_point: [block_rows, block_columns] int32, the code that means 0.0; None when symmetric.

    Raises:
        FormatError: a bound is not finite or low > high, or the scale does not fit its format; the message names
            the first bad block.

    Source:
        Jacob et al. 2018, arXiv:1712.05877, eq. 1. Differs: the range is widened to contain 0, so 0.0 is exact.
    """
    _check_range(low, high)
    low, high = low.to(torch.float32).clamp(max=0), high.to(torch.float32).clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / float(spec.format.high)
    else:
        # halves first: high - low overflows float32 where either alone does not
        scale = (high / (spec.code_high - spec.code_low)) - (low / (spec.code_high - spec.code_low))
    scale = torch.where((low == 0) & (high == 0), torch.ones_like(scale), scale)
    scale = round_scale(scale, spec)
    if spec.symmetric:
        return scale, None
    zero_point = (spec.code_low - low / scale).round().clamp(spec.code_low, spec.code_high)
    return scale, zero_point.to(torch.int32)


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Scales rounded to the nearest that the scale format of `spec` can hold, as float32 and never zero.

    Args:
        scale: [block_rows, block_columns] float32, > 0.
        spec: its `scale_format` decides.

    Raises:
        FormatError: a scale is larger than the format's largest number.

    Source:
        "int8" is the double quantization of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3). Differs: one
        outer scale per row of blocks, a bfloat16 number, so that outer * code is exact in float32. "e8m0" rounds
        up to the next power of two, so no value is clipped (OCP MX 1.0 rounds down and clips).
    """
    name = spec.scale_format
    scale = scale.to(torch.float32).clamp(min=_SMALLEST[name])
    if name == "fp16":
        if scale.numel() and float(scale.max()) > FORMATS["fp16"].high:
            raise FormatError(
                f"a scale of {float(scale.max()):.4g} does not fit float16 (largest 65504); add '/scale:fp32' to "
                f"{str(spec)!r}"
            )
        return scale.to(torch.float16).to(torch.float32)
    if name == "e8m0":
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return torch.ldexp(torch.ones_like(scale), exponent.clamp(-126, 127))
    if name == "int8":
        codes, outer = split_int8_scale(scale)
        return outer * codes.to(torch.float32)
    return scale


def split_int8_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes and one bfloat16 outer scale per row: `scale ~ outer * code`, code in 1..127.

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
        zero_point: [block_rows, block_columns] int32; required with `scale` when `spec` is asymmetric.

    Raises:
        FormatError: values are not a finite matrix, or scale and zero point do not have the block shape of `spec`.
    """
    if values.dim() != 2:
        raise FormatError(f"quantize takes a matrix [rows, columns], got shape {tuple(values.shape)}; reshape it first")
    _check_finite(values)
    if not spec.format.scaled:
        return QuantizedTensor(spec.format.encode(values), None, None, spec)
    blocks = to_blocks(values.to(torch.float32), spec.granularity)
    if scale is None:
        scale, zero_point = choose_scale(*block_range(blocks), spec)
    shape = (values.shape[0], values.shape[1])
    expected = scale_shape(spec.granularity, shape)
    if tuple(scale.shape) != expected or (zero_point is None) != spec.symmetric:
        raise FormatError(
            f"{spec} on a {shape[0]}x{shape[1]} matrix needs scales of shape {expected} and "
            f"{'no zero points' if spec.symmetric else 'zero points'}; got scales of shape {tuple(scale.shape)}"
        )
    codes = quantize_blocks(blocks, spec, scale, zero_point)
    return QuantizedTensor(from_blocks(codes, spec.granularity, shape), scale, zero_point, spec)


def quantize_blocks(blocks: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Codes [block_rows, block_columns, elements] of values in block view; the arithmetic under `quantize`."""
    scaled = blocks / scale.unsqueeze(-1)
    if spec.format.kind != "int":
        return spec.format.encode(scaled)
    codes = scaled.round()
    if zero_point is not None:
        codes = codes + zero_point.unsqueeze(-1)
    return codes.clamp(spec.code_low, spec.code_high).to(spec.format.storage)


def dequantize_blocks(codes: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Float32 values of codes in block view."""
    values = spec.format.decode(codes)
    if zero_point is not None:
        values = values - zero_point.unsqueeze(-1).to(torch.float32)
    return values * scale.unsqueeze(-1)


def block_range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every block, each [block_rows, block_columns]."""
    if blocks.shape[-1] == 0 or blocks.numel() == 0:
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
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise FormatError(
            f"block {where}: the range [{float(low[where])}, {float(high[where])}] is not finite or is reversed; "
            "a scale needs finite bounds with low <= high"
        )


def _check_finite(values: Tensor) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        where = tuple(int(i) for i in (~finite).nonzero()[0])
        raise FormatError(
            f"element {where} is {float(values[where])}; {int((~finite).sum())} of {values.numel()} values are not finite"
        )
