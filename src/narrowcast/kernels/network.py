"""The program of an integer network: convolutions and pools that hand 8-bit codes to each other, as plain numbers.

A program is what `conv_network_int8` runs in one call. It knows no module and no model: `nn/integer_graph.py` writes
it, `reference_network.py` defines what it means, the native library runs it. Images are [height, width, channels] in
memory. A *buffer* holds pixels of a number of channels; a *value* is a run of channels in a buffer, so that a
concatenation is one buffer which several steps fill and copies nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor

VERSION = 1


class StepKind(enum.IntEnum):
    """What a step does; the numbers are what the native library reads.

    Every per-channel constant below is float32 [channels of the target] unless it says otherwise, and lies in
    `NetworkProgram.constants` from `Step.constants` on in the order given.

    QUANTIZE: codes of a float input, source = index of the input. Constants [2]: inverse, zero.
        code = clamp(round(x * inverse), -zero, 255 - zero) + zero; a value that is not finite raises. The target is a
        whole buffer.
    CONV: acc = sum over taps and inputs of code * weight (int32); outside the image the code is the source's zero.
        Constants [4]: multiplier, offset, low, high; then, with a second source, [1]: second_multiplier; then, with an
        activation or a float target, [2]: inverse, zero. In this order, every operation rounding to float32:
            y = float(acc) * multiplier + offset
            with a second source: y = y + s * second_multiplier, s = float(code) where that is coded, else its value
            with an activation or a float target: y = activation(y); the float target stores y; y = y * inverse + zero
            y = min(max(y, low), high); a coded target stores round_half_even(y), so its low <= high are in 0..255
        (the zero points of source, second and target are in `offset`; scales of a coded target in all of them). A float
        target is a second, float32 copy of a coded target, for whoever adds or averages the image.
    MAX_POOL: the largest code or value of the window, outside the image excluded; source and target share scales.
    AVERAGE_POOL: Constants [4]: multiplier, offset, low, high.
            y = float(sum of the window) * (1 / count) * multiplier + offset, clamped and rounded as for CONV;
        a coded source is summed in int32 (what lies outside the image counts as the zero point), a float one in
        float32, row by row. count: the window's positions inside the padded image, or inside the image itself
        (flag EXCLUDE_PADDING).
    ADD: Constants [5]: multiplier, second_multiplier, offset, low, high; then, with an activation or a float target,
        [2]: inverse, zero. y = value * multiplier + second value * second_multiplier + offset, left to right; the rest
        is as for CONV.
    DEQUANTIZE: Constants [2]: scale, zero. y = (float(code) - zero) * scale.
    """

    QUANTIZE = 0
    CONV = 1
    MAX_POOL = 2
    AVERAGE_POOL = 3
    ADD = 4
    DEQUANTIZE = 5


class Activation(enum.IntEnum):
    """What a step applies besides its clamp."""

    NONE = 0
    HARDSWISH = 1
    """y * (min(max(y + 3, 0), 6) * (1 / 6))"""
    RELU = 2
    """max(y, 0); where there is no float target, ReLU and ReLU6 are `low` and `high` instead"""
    RELU6 = 3
    """min(max(y, 0), 6)"""


CEIL_MODE, EXCLUDE_PADDING, GLOBAL = 1, 2, 4
"""Flags of a pool: the output size is rounded up; padding does not count; the window is the whole image."""


@dataclass(frozen=True)
class Buffer:
    """Memory for images: `channels` per pixel of uint8 codes or of float32."""

    channels: int
    coded: bool


@dataclass(frozen=True)
class Value:
    """Channels [offset, offset + channels) of a buffer; `zero` is where its zero points begin in the constants.

    `zero` is [channels] float32: the codes of 0.0, for what lies outside the image; -1 for float values.
    """

    channels: int
    buffer: int
    offset: int = 0
    zero: int = -1


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pool, in pixels."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """(top, left, bottom, right)"""
    dilation: tuple[int, int] = (1, 1)
    flags: int = 0

    def output_size(self, size: int, axis: int) -> int:
        """Height (axis 0) or width (axis 1) of the output for an input of that size."""
        if self.flags & GLOBAL:
            return 1
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        before = self.padding[axis]
        room = size + before + self.padding[2 + axis] - reach
        if not self.flags & CEIL_MODE:
            return room // self.stride[axis] + 1
        count = -(-room // self.stride[axis]) + 1
        # as in torch: the last window must begin inside the image or its leading padding
        return count - 1 if (count - 1) * self.stride[axis] >= size + before else count

    def plan(self) -> list[int]:
        """PLAN_FIELDS integers that say how it changes the size of an image; none where it does not."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        same = [self.stride[a] == 1 and self.padding[a] + self.padding[2 + a] == reach[a] - 1 for a in (0, 1)]
        if all(same) and not self.flags & GLOBAL:
            return []
        return [*reach, *self.stride, *self.padding, self.flags]


PLAN_FIELDS = 9


@dataclass(frozen=True)
class Step:
    """One operation on values; see `StepKind`.

    Args:
        kind: what it does.
        source: the value it reads, or the input's index for QUANTIZE.
        target: the value it writes.
        second: what is added, or -1.
        constants: offset of its constants, in floats.
        panels: offset of its packed weight (conv2d_int8_pack) in bytes; CONV only.
        groups: of a convolution.
        window: geometry of a convolution or pool.
        activation: see Activation.
        float_target: CONV and ADD: the float value that is written besides a coded target, or -1.
    """

    kind: StepKind
    source: int
    target: int
    second: int = -1
    constants: int = 0
    panels: int = 0
    groups: int = 1
    window: Window = field(default_factory=Window)
    activation: Activation = Activation.NONE
    float_target: int = -1

    def encode(self) -> list[int]:
        """STEP_FIELDS integers."""
        window = self.window
        return [
            int(self.kind), self.source, self.second, self.target, self.constants, self.panels, int(self.activation),
            self.groups, *window.kernel, *window.stride, *window.padding, *window.dilation, window.flags,
            self.float_target,
        ]  # fmt: skip


HEADER, BUFFER_FIELDS, VALUE_FIELDS, STEP_FIELDS = 6, 2, 4, 20


@dataclass
class NetworkProgram:
    """A whole program.

    Args:
        inputs: number of float inputs [batch, channels, height, width]; all have the same batch.
        buffers, values, steps: see there; a step reads only channels that earlier steps wrote, and no channel of a
            buffer is written twice. Where a convolution reads beyond the image, all such readers of a channel agree on
            its zero point.
        outputs: values that are returned; float ones, each with a buffer of its own.
    """

    inputs: int
    buffers: list[Buffer]
    values: list[Value]
    steps: list[Step]
    outputs: list[int]

    def encode(self) -> Tensor:
        """1-D int64: header (version, inputs, buffers, values, steps, outputs), then the tables in that order."""
        parts = (self.buffers, self.values, self.steps, self.outputs)
        numbers = [VERSION, self.inputs, *(len(part) for part in parts)]
        for buffer in self.buffers:
            numbers += [buffer.channels, int(buffer.coded)]
        for value in self.values:
            numbers += [value.channels, value.buffer, value.offset, value.zero]
        for step in self.steps:
            numbers += step.encode()
        return torch.tensor(numbers + self.outputs, dtype=torch.int64)

    @classmethod
    def decode(cls, program: Tensor) -> NetworkProgram:
        """The inverse of `encode`."""
        numbers: list[int] = program.tolist()
        inputs, *counts = numbers[1:HEADER]
        at = HEADER

        def rows(count: int, width: int) -> list[list[int]]:
            nonlocal at
            table = [numbers[at + i * width : at + (i + 1) * width] for i in range(count)]
            at += count * width
            return table

        buffers = [Buffer(row[0], bool(row[1])) for row in rows(counts[0], BUFFER_FIELDS)]
        values = [Value(*row) for row in rows(counts[1], VALUE_FIELDS)]
        steps = [_decode_step(row) for row in rows(counts[2], STEP_FIELDS)]
        return cls(inputs, buffers, values, steps, numbers[at : at + counts[3]])

    def output_plan(self) -> list[int]:
        """The shape rule of the outputs as integers, for fake tensors, which cannot look into `encode()`.

        Per output: channels, number of windows between the first input and it, then 9 integers per window (kernel,
        stride, padding (top, left, bottom, right), flags) with dilation already in the kernel.
        """
        chains: dict[int, list[int]] = {}
        for step in self.steps:
            chain: list[int] = []
            if step.kind is not StepKind.QUANTIZE:
                chain = chains[self._written(step.source, chains)]
            if step.kind in (StepKind.CONV, StepKind.MAX_POOL, StepKind.AVERAGE_POOL):
                chain = chain + step.window.plan()
            chains[step.target] = chain
            if step.float_target >= 0:
                chains[step.float_target] = chain
        plan = []
        for output in self.outputs:
            chain = chains[self._written(output, chains)]
            plan += [self.values[output].channels, len(chain) // PLAN_FIELDS, *chain]
        return plan

    def _written(self, value: int, known: dict[int, list[int]]) -> int:
        """The value itself where a step wrote it, else one that is a part of it: a concatenation's first."""
        buffer = self.values[value].buffer
        return value if value in known else next(v for v in known if self.values[v].buffer == buffer)


def _decode_step(row: list[int]) -> Step:
    kind, source, second, target, constants, panels, activation, groups, *geometry = row
    kernel, stride, padding, dilation = geometry[0:2], geometry[2:4], geometry[4:8], geometry[8:10]
    window = Window(
        (kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[1], padding[2], padding[3]),
        (dilation[0], dilation[1]), geometry[10],
    )  # fmt: skip
    return Step(
        StepKind(kind), source, target, second, constants, panels, groups, window, Activation(activation), geometry[11]
    )
