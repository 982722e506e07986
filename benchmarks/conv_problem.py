"""One convolution to be timed: its shape, its numbers, and what can time it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.timing import Call


@dataclass(frozen=True)
class ConvLayer:
    """A square convolution followed by ReLU.

    Attributes:
        name: where it stands in its network.
        inputs: input channels.
        outputs: output channels.
        kernel: width of the square kernel.
        stride: in both directions.
        size: width of the square input.
        groups: `inputs` for a depthwise convolution.
    """

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether every channel is filtered alone."""
        return self.groups == self.inputs

    @property
    def output_size(self) -> int:
        """Width of the square output; the padding is half of the kernel."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def macs(self, batch: int) -> int:
        """Multiply-accumulates of one call."""
        return batch * self.output_size**2 * self.outputs * self.inputs // self.groups * self.kernel**2

    def values(self, batch: int) -> int:
        """Inputs and outputs of one call."""
        return batch * (self.size**2 * self.inputs + self.output_size**2 * self.outputs)

    def module(self) -> nn.Conv2d:
        """The layer with the same random weights in every run."""
        torch.manual_seed(self.inputs * 131 + self.outputs)
        padding = self.kernel // 2
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, padding, groups=self.groups).eval()

    def example(self, batch: int) -> Tensor:
        """An input [batch, inputs, size, size] as it follows a ReLU: at least 0; the first layer sees images."""
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, self.inputs, self.size, self.size, generator=generator)
        return x if self.inputs == 3 else x.relu()


def _bottleneck(size: int, narrow: int, wide: int) -> tuple[ConvLayer, ...]:
    """The three convolutions of a ResNet-50 block."""
    return (
        ConvLayer(f"1x1 {wide}>{narrow} @{size}", wide, narrow, 1, 1, size),
        ConvLayer(f"3x3 {narrow} @{size}", narrow, narrow, 3, 1, size),
        ConvLayer(f"1x1 {narrow}>{wide} @{size}", narrow, wide, 1, 1, size),
    )


def _depthwise(channels: int, size: int, stride: int = 1) -> ConvLayer:
    stepped = f" s{stride}" if stride > 1 else ""
    return ConvLayer(f"depthwise 3x3 {channels}{stepped} @{size}", channels, channels, 3, stride, size, channels)


# ResNet-50, then MobileNetV2 at 224.
LAYERS = (
    ConvLayer("7x7 s2 3>64 @224", 3, 64, 7, 2, 224),
    *_bottleneck(56, 64, 256),
    *_bottleneck(28, 128, 512),
    *_bottleneck(14, 256, 1024),
    *_bottleneck(7, 512, 2048),
    ConvLayer("1x1 16>96 @112", 16, 96, 1, 1, 112),
    _depthwise(96, 112, 2),
    ConvLayer("1x1 24>144 @56", 24, 144, 1, 1, 56),
    _depthwise(144, 56),
    ConvLayer("1x1 64>384 @14", 64, 384, 1, 1, 14),
    _depthwise(384, 14),
    ConvLayer("1x1 160>960 @7", 160, 960, 1, 1, 7),
    _depthwise(960, 7),
)

# From an input [batch, inputs, size, size] float32, the call that convolves it and applies ReLU.
Prepare = Callable[[Tensor], Call]


@dataclass(frozen=True)
class ConvContender:
    """One way to compute the layer.

    Attributes:
        name: how results call it.
        operand: "int8", "float32" or "bfloat16": whose multiply peak bounds it.
        value_bytes: bytes of one input or output value as the call takes and gives it.
        make: from a layer, what prepares calls at the current number of threads.
        answer: the result of a call as float32 [batch, outputs, size, size].
    """

    name: str
    operand: str
    value_bytes: int
    make: Callable[[ConvLayer], Prepare]
    answer: Callable[[Tensor], Tensor] = torch.Tensor.float
