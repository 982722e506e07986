"""Pure torch body of conv_network_int8: the interpreter that defines what a NetworkProgram means, bit for bit.

Codes are kept as float32, which holds them exactly; sums of integers are formed in float64. Every float step is one
float32 operation in the order that `StepKind` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.kernels.network import (
    EXCLUDE_PADDING,
    GLOBAL,
    Activation,
    NetworkProgram,
    Step,
    StepKind,
    Window,
)
from narrowcast.kernels.op import Op
from narrowcast.kernels.reference_conv import PANEL, WORD, conv2d_int8_unpack

NAME = "narrowcast.conv_network_int8"
WINDOW_INTEGERS = 9
"""Integers per window of NetworkProgram.output_plan."""


def conv_network_int8(
    inputs: Sequence[Tensor], program: Tensor, constants: Tensor, panels: Tensor, plan: Sequence[int]
) -> list[Tensor]:
    """Runs a whole network of integer convolutions and pools; activations between them stay 8-bit codes.

    Args:
        inputs:    float images [batch, channels, height, width], float32, bfloat16 or float16, finite.
        program:   NetworkProgram.encode().
        constants: 1-D float32, what the program's offsets point into.
        panels:    1-D int8: packed weights of all convolutions (conv2d_int8_pack), each from a multiple of 64 bytes on.
        plan:      NetworkProgram.output_plan(); read by the shape rule only.

    Returns:
        outputs: one per NetworkProgram.outputs, [batch, channels, height, width] in the first input's dtype, channels
            next to each other in memory.

    Raises:
        RuntimeError: an input holds a NaN or an infinity, or program and sizes do not fit together.
    """
    decoded = NetworkProgram.decode(program)
    machine = _Interpreter(decoded, [x.float() for x in inputs], constants, panels)
    for step in decoded.steps:
        machine.run(step)
    return [_channels_last(machine.read(value), inputs[0].dtype) for value in decoded.outputs]


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _empty_output(x, list(x.shape), dtype).copy_(x)


def _empty_output(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    _, channels, height, width = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(tuple(shape), strides, dtype=dtype, device=x.device)


class _Interpreter:
    """The buffers of one call and the steps on them."""

    def __init__(self, program: NetworkProgram, inputs: list[Tensor], constants: Tensor, panels: Tensor) -> None:
        self.program, self.inputs, self.constants, self.panels = program, inputs, constants, panels
        self.buffers: dict[int, Tensor] = {}

    def read(self, value: int) -> Tensor:
        row = self.program.values[value]
        return self.buffers[row.buffer][:, row.offset : row.offset + row.channels]

    def write(self, value: int, result: Tensor) -> None:
        row = self.program.values[value]
        if row.buffer not in self.buffers:
            shape = (result.shape[0], self.program.buffers[row.buffer].channels, *result.shape[2:])
            self.buffers[row.buffer] = result.new_zeros(shape)
        self.buffers[row.buffer][:, row.offset : row.offset + row.channels] = result

    def coded(self, value: int) -> bool:
        return self.program.buffers[self.program.values[value].buffer].coded

    def zero(self, value: int) -> Tensor:
        row = self.program.values[value]
        return self.constants[row.zero : row.zero + row.channels].reshape(1, -1, 1, 1)

    def rows(self, step: Step) -> Iterator[Tensor]:
        """The step's per-channel constants one after the other, each [1, channels, 1, 1]."""
        channels = self.program.values[step.target].channels
        at = step.constants
        while True:
            yield self.constants[at : at + channels].reshape(1, -1, 1, 1)
            at += channels

    def run(self, step: Step) -> None:
        body = {
            StepKind.QUANTIZE: self.quantize,
            StepKind.CONV: self.convolve,
            StepKind.MAX_POOL: self.max_pool,
            StepKind.AVERAGE_POOL: self.average_pool,
            StepKind.ADD: self.add,
            StepKind.DEQUANTIZE: self.dequantize,
        }[step.kind]
        self.write(step.target, body(step))

    def finish(self, step: Step, y: Tensor, low: Tensor, high: Tensor, late: Iterator[Tensor]) -> Tensor:
        """Activation, float copy, clamp; rounds what is stored as codes. `late`: the rows inverse and zero."""
        if step.activation or step.float_target >= 0:
            y = _activate(step.activation, y)
            if step.float_target >= 0:
                self.write(step.float_target, y)
            y = y * next(late) + next(late)
        y = torch.minimum(torch.maximum(y, low), high)
        return torch.round(y) if self.coded(step.target) else y

    def quantize(self, step: Step) -> Tensor:
        x, rows = self.inputs[step.source], self.rows(step)
        bad = ~torch.isfinite(x)
        if bool(bad.any()):
            raise RuntimeError(f"{NAME}: Non-finite value in input {step.source} at {bad.nonzero()[0].tolist()}")
        inverse, zero = next(rows), next(rows)
        return torch.round(torch.minimum(torch.maximum(x * inverse, -zero), 255 - zero)) + zero

    def convolve(self, step: Step) -> Tensor:
        window, rows = step.window, self.rows(step)
        codes, weight = self.read(step.source), self.weight(step)
        top, left, bottom, right = window.padding
        zero = self.zero(step.source) if any(window.padding) else 0.0
        wide = (F.pad(codes - zero, (left, right, top, bottom)) + zero).double()
        sums = F.conv2d(wide, weight, None, window.stride, dilation=window.dilation, groups=step.groups)
        multiplier, offset = next(rows), next(rows)
        low, high = next(rows), next(rows)
        y = sums.to(torch.int32).float() * multiplier + offset
        if step.second >= 0:
            y = y + self.read(step.second) * next(rows)
        return self.finish(step, y, low, high, rows)

    def weight(self, step: Step) -> Tensor:
        """[O, I / groups, kh, kw] float64."""
        window, groups = step.window, step.groups
        outputs = self.program.values[step.target].channels
        inputs = self.program.values[step.source].channels // groups
        length = packed_bytes(outputs, inputs, window.kernel[0] * window.kernel[1], groups)
        packed = self.panels[step.panels : step.panels + length]
        weight = conv2d_int8_unpack(packed, outputs, inputs, window.kernel, groups)
        return weight.reshape(outputs, inputs, *window.kernel).double()

    def max_pool(self, step: Step) -> Tensor:
        x = self.read(step.source)
        lowest = 0.0 if self.coded(step.source) else float("-inf")
        taps = _window_taps(x, step.window, lowest, lowest)
        y = next(taps)
        for tap in taps:
            y = torch.maximum(y, tap)
        return y

    def average_pool(self, step: Step) -> Tensor:
        x, rows, window = self.read(step.source), self.rows(step), step.window
        coded, excluded = self.coded(step.source), bool(window.flags & EXCLUDE_PADDING)
        ones = torch.ones(1, 1, *x.shape[2:])
        count = _added(_window_taps(ones, window, 0.0 if excluded else 1.0, 0.0))
        if coded and not excluded and any(window.padding) and not window.flags & GLOBAL:
            zero = self.zero(step.source)
            total = _added(_window_taps((x - zero).double(), window, 0.0, 0.0)) + zero * count
        elif coded:
            total = _added(_window_taps(x.double(), window, 0.0, 0.0))
        else:
            total = _added(_window_taps(x, window, 0.0, 0.0))
        multiplier, offset = next(rows), next(rows)
        y = total.float() * (torch.ones_like(count) / count) * multiplier + offset
        return self.finish(step, y, next(rows), next(rows), rows)

    def add(self, step: Step) -> Tensor:
        rows = self.rows(step)
        y = self.read(step.source) * next(rows)
        y = y + self.read(step.second) * next(rows)
        return self.finish(step, y + next(rows), next(rows), next(rows), rows)

    def dequantize(self, step: Step) -> Tensor:
        rows = self.rows(step)
        scale, zero = next(rows), next(rows)
        return (self.read(step.source) - zero) * scale


def _activate(activation: Activation, y: Tensor) -> Tensor:
    match activation:
        case Activation.HARDSWISH:
            return y * ((y + 3).clamp(0, 6) * (torch.ones_like(y) / 6))
        case Activation.RELU:
            return y.clamp(min=0)
        case Activation.RELU6:
            return y.clamp(0, 6)
    return y


def _added(taps: Iterator[Tensor]) -> Tensor:
    """Their sum, one after the other."""
    return functools.reduce(torch.add, taps)


def packed_bytes(outputs: int, inputs: int, taps: int, groups: int) -> int:
    """Length of conv2d_int8_pack's result for `inputs` input channels per group."""
    if inputs == 1 and outputs == groups:
        return -(-outputs // PANEL) * PANEL * taps
    return groups * -(-(outputs // groups) // PANEL) * PANEL * taps * -(-inputs // WORD) * WORD


def _window_taps(x: Tensor, window: Window, padding: float, beyond: float) -> Iterator[Tensor]:
    """What each position of the window sees, row by row: `padding` around the image, `beyond` what CEIL_MODE adds."""
    height, width = x.shape[2:]
    if window.flags & GLOBAL:
        yield from (x[:, :, y : y + 1, w : w + 1] for y in range(height) for w in range(width))
        return
    top, left, bottom, right = window.padding
    x = F.pad(x, (left, right, top, bottom), value=padding)
    sizes = [window.output_size(size, axis) for axis, size in enumerate((height, width))]
    reach = [
        (sizes[a] - 1) * window.stride[a] + window.dilation[a] * (window.kernel[a] - 1) + 1 - x.shape[2 + a]
        for a in (0, 1)
    ]
    x = F.pad(x, (0, max(reach[1], 0), 0, max(reach[0], 0)), value=beyond)
    for ky in range(window.kernel[0]):
        for kx in range(window.kernel[1]):
            y, w = ky * window.dilation[0], kx * window.dilation[1]
            rows = x[:, :, y : y + (sizes[0] - 1) * window.stride[0] + 1 : window.stride[0]]
            yield rows[:, :, :, w : w + (sizes[1] - 1) * window.stride[1] + 1 : window.stride[1]]


def _fake_network(
    inputs: Sequence[Tensor], program: Tensor, constants: Tensor, panels: Tensor, plan: Sequence[int]
) -> list[Tensor]:
    x, numbers = inputs[0], list(plan)
    outputs = []
    at = 0
    while at < len(numbers):
        channels, windows = numbers[at : at + 2]
        at += 2
        height, width = x.shape[2], x.shape[3]
        for _ in range(windows):
            kernel_h, kernel_w, stride_h, stride_w, *padding, flags = numbers[at : at + WINDOW_INTEGERS]
            top, left, bottom, right = padding
            window = Window((kernel_h, kernel_w), (stride_h, stride_w), (top, left, bottom, right), flags=flags)
            height, width = window.output_size(height, 0), window.output_size(width, 1)
            at += WINDOW_INTEGERS
        outputs.append(_empty_output(x, (x.shape[0], channels, height, width), x.dtype))
    return outputs


OPS = (
    Op(
        "conv_network_int8",
        "(Tensor[] inputs, Tensor program, Tensor constants, Tensor panels, int[] plan) -> Tensor[]",
        conv_network_int8,
        _fake_network,
    ),
)
