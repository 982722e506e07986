"""Random programs of conv_network_int8, shared by its tests: a builder that keeps constants and weights together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from narrowcast import kernels
from narrowcast.kernels.network import Activation, Buffer, NetworkProgram, Step, StepKind, Value, Window


def window(kernel: int, stride: int = 1, padding: int | None = None, dilation: int = 1, flags: int = 0) -> Window:
    """A square window; by default padded so that stride 1 keeps the size."""
    side = dilation * (kernel - 1) // 2 if padding is None else padding
    return Window((kernel, kernel), (stride, stride), (side,) * 4, (dilation, dilation), flags)


POINT = window(1)


@dataclass
class Builder:
    """Appends steps with random constants; every method returns the index of the value it wrote."""

    seed: int = 0
    program: NetworkProgram = field(default_factory=lambda: NetworkProgram(0, [], [], [], []))
    constants: list[Tensor] = field(default_factory=list)
    panels: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)

    def keep(self, *rows: Tensor) -> int:
        """Appends constants and returns where they begin."""
        begin = sum(len(row) for row in self.constants)
        self.constants += rows
        return begin

    def uniform(self, count: int, low: float, high: float) -> Tensor:
        return torch.rand(count, generator=self.random) * (high - low) + low

    def buffer(self, channels: int, coded: bool = True) -> int:
        self.program.buffers.append(Buffer(channels, coded))
        return len(self.program.buffers) - 1

    def value(self, channels: int, coded: bool = True, buffer: int = -1, offset: int = 0) -> int:
        """A value in a buffer of its own, or at `offset` of one that exists."""
        buffer = self.buffer(channels, coded) if buffer < 0 else buffer
        zero = self.keep(self.zeros(channels)) if coded else -1
        self.program.values.append(Value(channels, buffer, offset, zero))
        return len(self.program.values) - 1

    def zeros(self, channels: int) -> Tensor:
        return torch.randint(0, 256, (channels,), generator=self.random).float()

    def constants_of(self, value: int) -> Tensor:
        """The zero points of a value."""
        row = self.program.values[value]
        return torch.cat(self.constants)[row.zero : row.zero + row.channels]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Everything but the inputs, once `finish` was called."""
        panels = torch.cat(self.panels) if self.panels else torch.zeros(0, dtype=torch.int8)
        return self.program.encode(), torch.cat(self.constants), panels, self.program.output_plan()

    def channels(self, value: int) -> int:
        return self.program.values[value].channels

    def coded(self, value: int) -> bool:
        return self.program.buffers[self.program.values[value].buffer].coded

    def step(self, kind: StepKind, source: int, target: int, rows: Sequence[Tensor], **more: object) -> int:
        step = Step(kind, source, target, constants=self.keep(*rows))
        self.program.steps.append(replace(step, **more))  # type: ignore[arg-type]
        return target

    def limits(self, target: int) -> list[Tensor]:
        """low and high: whole codes or values, some of them a ReLU's or ReLU6's."""
        count = self.channels(target)
        if not self.coded(target):
            return [self.uniform(count, -3, -0.5), self.uniform(count, 0.5, 3)]
        return [torch.randint(0, 60, (count,), generator=self.random).float(), self.uniform(count, 180, 255)]

    def quantize(self, channels: int, per_channel: bool = False) -> int:
        """A new input and its codes."""
        self.program.inputs += 1
        inverse, zero = self.uniform(channels, 30, 50), self.zeros(channels)
        if not per_channel:
            inverse, zero = inverse[:1].expand(channels), zero[:1].expand(channels)
        target = self.value(channels)
        return self.step(StepKind.QUANTIZE, self.program.inputs - 1, target, [inverse, zero])

    def conv(
        self, source: int, outputs: int, shape: Window = POINT, groups: int = 1, second: int = -1,
        activation: Activation = Activation.NONE, coded: bool = True, target: int = -1, floats: int = -1,
    ) -> int:  # fmt: skip
        inputs, taps = self.channels(source) // groups, shape.kernel[0] * shape.kernel[1]
        target = self.value(outputs, coded) if target < 0 else target
        weight = torch.randint(-127, 128, (outputs, inputs * taps), dtype=torch.int8, generator=self.random)
        late = bool(activation) or floats >= 0
        spread = math.sqrt(inputs * taps) * 150 * 73 / (50 if coded and not late else 1)
        multiplier = self.uniform(outputs, 0.5, 1.5) / spread
        middle = -weight.sum(dim=1, dtype=torch.int32).float() * 128 * multiplier
        offset = middle + (128 if coded and not late else 0)
        rows = [multiplier, offset, *self.limits(target)]
        if second >= 0:
            rows.append(self.uniform(outputs, -0.3, 0.3))
        if late:
            rows += [self.uniform(outputs, 20, 60), self.zeros(outputs)]
        packed = kernels.OPS["conv2d_int8_pack"].reference(weight, shape.kernel, groups)
        begin = sum(len(panel) for panel in self.panels)
        self.panels.append(torch.nn.functional.pad(packed, (0, -len(packed) % 64)))
        return self.step(
            StepKind.CONV, source, target, rows, second=second, panels=begin, groups=groups, window=shape,
            activation=activation, float_target=floats,
        )  # fmt: skip

    def depthwise(self, source: int, shape: Window, **more: object) -> int:
        channels = self.channels(source)
        return self.conv(source, channels, shape, channels, **more)  # type: ignore[arg-type]

    def max_pool(self, source: int, shape: Window, target: int = -1) -> int:
        target = self.value(self.channels(source), self.coded(source)) if target < 0 else target
        return self.step(StepKind.MAX_POOL, source, target, [], window=shape)

    def average_pool(self, source: int, shape: Window, coded: bool = True) -> int:
        target = self.value(self.channels(source), coded)
        count = self.channels(source)
        rows = [self.uniform(count, 0.5, 1.5), self.uniform(count, -9, 9), *self.limits(target)]
        return self.step(StepKind.AVERAGE_POOL, source, target, rows, window=shape)

    def add(
        self, source: int, second: int, coded: bool = True, target: int = -1,
        activation: Activation = Activation.NONE, floats: int = -1,
    ) -> int:  # fmt: skip
        count = self.channels(source)
        target = self.value(count, coded) if target < 0 else target
        rows = [self.uniform(count, 0.1, 0.9) for _ in range(2)] + [self.uniform(count, -9, 9), *self.limits(target)]
        if activation or floats >= 0:
            rows += [self.uniform(count, 20, 60), self.zeros(count)]
        return self.step(StepKind.ADD, source, target, rows, second=second, activation=activation, float_target=floats)

    def dequantize(self, source: int) -> int:
        count = self.channels(source)
        return self.step(
            StepKind.DEQUANTIZE,
            source,
            self.value(count, coded=False),
            [self.uniform(count, 0.01, 0.1), self.zeros(count)],
        )

    def finish(self, *outputs: int) -> None:
        """Names the outputs; coded ones are dequantized."""
        self.program.outputs = [self.dequantize(value) if self.coded(value) else value for value in outputs]


def residual_network(seed: int, channels: int = 16) -> Builder:
    """A small ResNet: coded and float second sources, a strided shortcut, ADD, both global pools."""
    b = Builder(seed)
    x = b.conv(b.quantize(3), channels, window(3))
    y = b.conv(b.conv(x, channels, window(3)), channels, window(3), second=x)
    z = b.conv(y, 2 * channels, window(3, 2))
    shortcut = b.conv(y, 2 * channels, window(1, 2), coded=False)
    floats = b.value(2 * channels, coded=False)
    z = b.conv(z, 2 * channels, window(3), second=shortcut, activation=Activation.RELU, floats=floats)
    added = b.value(2 * channels, coded=False)
    w = b.conv(z, 2 * channels, window(3), activation=Activation.HARDSWISH)
    w = b.add(floats, w, activation=Activation.RELU6, floats=added)
    w = b.conv(w, 2 * channels, second=added, floats=b.value(2 * channels, coded=False))
    pooled = b.average_pool(w, window(1, flags=4))
    b.finish(b.conv(pooled, 10, coded=False), b.max_pool(w, window(1, flags=4)), shortcut)
    return b


def mobile_network(seed: int, channels: int = 8) -> Builder:
    """Depthwise 3x3 and 5x5 at strides 1 and 2 with pointwise ones between, hardswish, odd channels."""
    b = Builder(seed)
    x = b.conv(b.quantize(3, per_channel=True), channels, window(3, 2), activation=Activation.HARDSWISH)
    x = b.conv(b.depthwise(x, window(3)), 2 * channels)
    x = b.conv(b.depthwise(x, window(3, 2)), 4 * channels + 1)
    y = b.depthwise(x, window(5), activation=Activation.HARDSWISH)
    x = b.conv(y, 4 * channels + 1, second=x)
    x = b.conv(b.depthwise(x, window(5, 2)), 8 * channels)
    x = b.depthwise(x, window(3, dilation=2), second=x)
    x = b.depthwise(x, Window((2, 3), (1, 3), (0, 2, 1, 1)), coded=False)
    b.finish(x, b.average_pool(y, window(1, flags=4), coded=False))
    return b


def fire_network(seed: int, channels: int = 16) -> Builder:
    """Concatenations in one buffer, max pools with ceil mode, grouped and dilated convolutions, average pools."""
    b = Builder(seed)
    x = b.max_pool(b.conv(b.quantize(3), channels, window(3, 2, 0)), window(3, 2, 0, flags=1))
    squeezed = b.conv(x, 4)
    both = b.buffer(2 * channels)
    left, right = (b.value(channels, buffer=both, offset=at) for at in (0, channels))
    b.conv(squeezed, channels, target=left)
    b.conv(squeezed, channels, window(3), target=right)
    whole = b.value(2 * channels, buffer=both)
    # what lies outside the image must be the same for every reader of a channel
    joined = torch.cat([b.constants_of(left), b.constants_of(right)])
    b.program.values[whole] = replace(b.program.values[whole], zero=b.keep(joined))
    x = b.conv(whole, 3 * channels, window(3, padding=1), groups=2)
    part = b.conv(left, 5, window(3, dilation=2))
    x = b.average_pool(x, window(3, 2, 1, flags=1))
    x = b.average_pool(x, window(2, 1, 1, flags=2))
    f = b.conv(x, 6, window(2, 1, 0), coded=False)
    f = b.average_pool(b.max_pool(f, window(3, 1, 1)), window(2, 1, 1, flags=1), coded=False)
    b.finish(f, part, b.conv(right, 6, Window((1, 3), (2, 1), (0, 2, 0, 1)), groups=2))
    return b


NETWORKS = {"residual": residual_network, "mobile": mobile_network, "fire": fire_network}
