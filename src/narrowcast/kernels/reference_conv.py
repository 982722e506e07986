"""Pure torch bodies of the convolution ops: they define what the native kernels must compute, bit for bit.

Integers are convolved in float64, which is exact below 2**53. Every float step is one float32 operation in a fixed
order, so that all instruction sets round alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.kernels.op import Op
from narrowcast.kernels.reference import SMALLEST_RANGE

PANEL = 16
"""Output channels that one weight panel holds side by side."""

WORD = 4
"""Input channels that one integer dot product consumes."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_packing(name: str, outputs: int, inputs: int, kernel_size: Sequence[int], groups: int) -> int:
    """The number of kernel taps, or RuntimeError when the sizes cannot be those of a convolution."""
    taps = kernel_size[0] * kernel_size[1]
    if min(outputs, inputs, taps, groups) < 1 or outputs % groups:
        raise RuntimeError(
            f"narrowcast.{name}: {groups} groups, {outputs} output channels, {inputs} inputs per group and kernel"
            f" {list(kernel_size)} do not fit together"
        )
    return taps


def conv2d_int8_pack(weight: Tensor, kernel_size: Sequence[int], groups: int) -> Tensor:
    """Convolution weights in the order the kernels read them: a permutation, padded with zeros.

    Args:
        weight:      [O, I / groups * kh * kw] int8, OIHW order.
        kernel_size: (kh, kw).
        groups:      divides O.

    Returns:
        packed: 1-D int8. Depthwise (one input and one output channel per group): [O / 16][kh * kw][16]; otherwise
            [groups][O / groups / 16][kh * kw][I / groups / 4][16][4], each quotient rounded up.
    """
    outputs = weight.shape[0]
    inputs = weight.shape[1] // max(kernel_size[0] * kernel_size[1], 1)
    taps = _check_packing("conv2d_int8_pack", outputs, inputs, kernel_size, groups)
    if weight.shape[1] != inputs * taps:
        raise RuntimeError(f"narrowcast.conv2d_int8_pack: weight {list(weight.shape)} for a kernel of {taps} taps")
    if inputs == 1 and outputs == groups:
        panels = F.pad(weight, (0, 0, 0, _round_up(outputs, PANEL) - outputs)).reshape(-1, PANEL, taps)
        return panels.transpose(1, 2).reshape(-1).contiguous()
    grouped = weight.reshape(groups, outputs // groups, inputs, taps)
    short_inputs, short_outputs = -inputs % WORD, -(outputs // groups) % PANEL
    grouped = F.pad(grouped, (0, 0, 0, short_inputs, 0, short_outputs))
    panels = grouped.reshape(groups, -1, PANEL, grouped.shape[2] // WORD, WORD, taps)
    return panels.permute(0, 1, 5, 3, 2, 4).reshape(-1).contiguous()


def conv2d_int8_unpack(
    packed: Tensor, out_channels: int, in_channels_per_group: int, kernel_size: Sequence[int], groups: int
) -> Tensor:
    """The weight [O, I / groups * kh * kw] int8 that conv2d_int8_pack was given: its exact inverse."""
    inputs = in_channels_per_group
    taps = _check_packing("conv2d_int8_unpack", out_channels, inputs, kernel_size, groups)
    depthwise = inputs == 1 and out_channels == groups
    outputs, padded_inputs = out_channels // groups, _round_up(inputs, WORD)
    expected = taps * (
        _round_up(out_channels, PANEL) if depthwise else groups * _round_up(outputs, PANEL) * padded_inputs
    )
    if packed.numel() != expected:
        raise RuntimeError(f"narrowcast.conv2d_int8_unpack: packed has {packed.numel()} bytes, expected {expected}")
    if depthwise:
        return packed.reshape(-1, taps, PANEL).transpose(1, 2).reshape(-1, taps)[:out_channels].contiguous()
    panels = packed.reshape(groups, -1, taps, padded_inputs // WORD, PANEL, WORD).permute(0, 1, 4, 3, 5, 2)
    grouped = panels.reshape(groups, -1, padded_inputs, taps)[:, :outputs, :inputs]
    return grouped.reshape(out_channels, inputs * taps).contiguous()


def _check_finite(values: Tensor) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        raise RuntimeError(f"narrowcast.conv2d_int8: Non-finite value in x at {bad.nonzero()[0].tolist()}")


def _dynamic_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each sample and its scale [B, 1, 1, 1]."""
    absmax = values.abs().amax(dim=(1, 2, 3), keepdim=True)
    zero = absmax < SMALLEST_RANGE
    # A tensor 127: `127.0 / tensor` is reciprocal times 127 in torch, which rounds twice.
    inverse = torch.where(zero, 0.0, torch.full_like(absmax, 127.0) / torch.where(zero, 1.0, absmax))
    return torch.round((values * inverse).clamp(-127, 127)), torch.where(zero, 1.0, absmax / 127.0)


def _static_codes(values: Tensor, input_inverse: Tensor, input_zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Codes minus the zero point with ranges for all samples; the scale is in the weights, so it is 1 here."""
    zero = input_zero_point.reshape(1, -1, 1, 1).float()
    scaled = values * input_inverse.reshape(1, -1, 1, 1)
    return torch.round(torch.minimum(torch.maximum(scaled, -zero), 255 - zero)), values.new_ones(1, 1, 1, 1)


def _spread(codes: Tensor, upsample: Sequence[int], padding: Sequence[int], output_padding: Sequence[int]) -> Tensor:
    """Codes with zeros between neighbours (transposed convolution) and around the edge."""
    if tuple(upsample) != (1, 1):
        batch, channels, height, width = codes.shape
        wide = codes.new_zeros(batch, channels, (height - 1) * upsample[0] + 1, (width - 1) * upsample[1] + 1)
        wide[:, :, :: upsample[0], :: upsample[1]] = codes
        codes = wide
    top, left, bottom, right = padding
    return F.pad(codes, (left, right + output_padding[1], top, bottom + output_padding[0]))


def conv2d_int8(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_sum: Tensor,
    bias: Tensor | None,
    input_inverse: Tensor | None,
    input_zero_point: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample: Sequence[int],
    output_padding: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """2-D convolution with int8 weights and 8-bit activations.

    Args:
        x:                [B, C, H, W] float32, bfloat16 or float16, finite.
        packed:           what conv2d_int8_pack returned.
        scale:            [O] float32, weight units per code step. Static: times the input scale, unless every channel
            has its own and the caller has folded those into the weight.
        zero_sum:         [O] int32, what the codes of 0.0 add up to: the sum over all weights of the output channel of
            weight * input_zero_point[its input channel]. Dynamic: 128 * the sum of the weights.
        bias:             [O] float, or None.
        input_inverse:    [1] or [C] float32 > 0, static: uint8 codes, this many steps per activation unit (1 / input
            scale in float32). None, dynamic: symmetric int8 per sample, absmax / 127.
        input_zero_point: as long as input_inverse, int32 in 0..255, the uint8 code of 0.0; None with it.
        kernel_size:      (kh, kw).
        stride:           (y, x).
        padding:          (top, left, bottom, right) >= 0, in positions after upsampling; the value is 0.0.
        dilation:         (y, x).
        groups:           divides C and O.
        upsample:         (y, x); (1, 1) for a convolution. (s, s) puts s - 1 zeros between neighbours first: a
            transposed convolution, whose caller has flipped the kernel and set padding to dilation * (k - 1) - p.
        output_padding:   (y, x) more positions at the bottom and right.
        channels_last:    memory format of the result.

    Returns:
        y: [B, O, H', W'] in x's dtype: float(integer sum) * (sample scale * scale) + bias; the integer sum is that of
            (code - zero point) * weight, the sample scale of a static call 1.

    Raises:
        RuntimeError: x holds a NaN or an infinity, or the sizes do not fit together.
    """
    values = x.float()
    _check_finite(values)
    outputs, inputs = scale.shape[0], x.shape[1] // groups
    weight = conv2d_int8_unpack(packed, outputs, inputs, kernel_size, groups).reshape(outputs, inputs, *kernel_size)
    if input_inverse is None or input_zero_point is None:
        codes, step = _dynamic_codes(values)
    else:
        codes, step = _static_codes(values, input_inverse, input_zero_point)
    codes = _spread(codes, upsample, padding, output_padding).double()
    sums = F.conv2d(codes, weight.double(), None, stride=stride, dilation=dilation, groups=groups)
    result = sums.to(torch.int32).float() * (step * scale[None, :, None, None])
    if bias is not None:
        result = result + bias.float()[None, :, None, None]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(result, dtype=x.dtype, memory_format=memory_format).copy_(result)


def conv2d_int8_planned(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_sum: Tensor,
    bias: Tensor | None,
    input_inverse: Tensor | None,
    input_zero_point: Tensor | None,
    plan: Sequence[int],
) -> Tensor:
    """conv2d_int8 with its integers in one list, because every list argument costs a call about 0.8 us.

    Args:
        x:                as in conv2d_int8, and so on to input_zero_point.
        packed:           see conv2d_int8.
        scale:            see conv2d_int8.
        zero_sum:         see conv2d_int8.
        bias:             see conv2d_int8.
        input_inverse:    see conv2d_int8.
        input_zero_point: see conv2d_int8.
        plan:             what conv_plan returned.

    Returns:
        y: as conv2d_int8.

    Raises:
        RuntimeError: as conv2d_int8, or the plan does not have 16 entries.
    """
    return conv2d_int8(x, packed, scale, zero_sum, bias, input_inverse, input_zero_point, *_unfold_plan(plan))


def conv_plan(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample: Sequence[int],
    output_padding: Sequence[int],
    channels_last: bool,
) -> list[int]:
    """The integers of conv2d_int8, in its order, as the one list of conv2d_int8_planned."""
    lists = (*kernel_size, *stride, *padding, *dilation, groups, *upsample, *output_padding)
    return [*lists, int(channels_last)]


def _unfold_plan(plan: Sequence[int]) -> tuple[Any, ...]:
    if len(plan) != 16:
        raise RuntimeError(f"narrowcast.conv2d_int8_planned: plan must have 16 entries, got {len(plan)}")
    p = list(plan)
    return p[0:2], p[2:4], p[4:8], p[8:10], p[10], p[11:13], p[13:15], bool(p[15])


def _fake_planned(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_sum: Tensor,
    bias: Tensor | None,
    input_inverse: Tensor | None,
    input_zero_point: Tensor | None,
    plan: Sequence[int],
) -> Tensor:
    return _fake_conv(x, packed, scale, zero_sum, bias, input_inverse, input_zero_point, *_unfold_plan(plan))


def _fake_pack(weight: Tensor, kernel_size: Sequence[int], groups: int) -> Tensor:
    outputs, taps = weight.shape[0], kernel_size[0] * kernel_size[1]
    inputs = weight.shape[1] // taps
    if inputs == 1 and outputs == groups:
        return weight.new_empty(_round_up(outputs, PANEL) * taps)
    return weight.new_empty(groups * _round_up(outputs // groups, PANEL) * taps * _round_up(inputs, WORD))


def _fake_unpack(packed: Tensor, out_channels: int, inputs: int, kernel_size: Sequence[int], groups: int) -> Tensor:
    return packed.new_empty(out_channels, inputs * kernel_size[0] * kernel_size[1])


def _fake_conv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_sum: Tensor,
    bias: Tensor | None,
    input_inverse: Tensor | None,
    input_zero_point: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample: Sequence[int],
    output_padding: Sequence[int],
    channels_last: bool,
) -> Tensor:
    def size(axis: int) -> int:
        wide = (x.shape[2 + axis] - 1) * upsample[axis] + 1 + padding[axis] + padding[axis + 2] + output_padding[axis]
        return (wide - dilation[axis] * (kernel_size[axis] - 1) - 1) // stride[axis] + 1

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (x.shape[0], scale.shape[0], size(0), size(1)), dtype=x.dtype, device=x.device, memory_format=memory_format
    )


OPS = (
    Op("conv2d_int8_pack", "(Tensor weight, int[] kernel_size, int groups) -> Tensor", conv2d_int8_pack, _fake_pack),
    Op(
        "conv2d_int8_unpack",
        "(Tensor packed, int out_channels, int in_channels_per_group, int[] kernel_size, int groups) -> Tensor",
        conv2d_int8_unpack,
        _fake_unpack,
    ),
    Op(
        "conv2d_int8",
        "(Tensor x, Tensor packed, Tensor scale, Tensor zero_sum, Tensor? bias, Tensor? input_inverse,"
        " Tensor? input_zero_point, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups,"
        " int[] upsample, int[] output_padding, bool channels_last) -> Tensor",
        conv2d_int8,
        _fake_conv,
    ),
    Op(
        "conv2d_int8_planned",
        "(Tensor x, Tensor packed, Tensor scale, Tensor zero_sum, Tensor? bias, Tensor? input_inverse,"
        " Tensor? input_zero_point, int[] plan) -> Tensor",
        conv2d_int8_planned,
        _fake_planned,
    ),
)
