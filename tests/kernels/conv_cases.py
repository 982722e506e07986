"""Random arguments of the convolution op, shared by the convolution tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from narrowcast import kernels


@dataclass(frozen=True)
class ConvCase:
    """Everything about one call but the values."""

    batch: int = 2
    channels: int = 8
    height: int = 7
    width: int = 9
    outputs: int = 17
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    upsample: tuple[int, int] = (1, 1)
    output_padding: tuple[int, int] = (0, 0)
    bias: bool = True
    zero_point: int | None = 117  # None: dynamic
    per_channel: bool = False  # scales of their own; with a zero_point other than 0, zero points too
    channels_last: bool = False
    layout: str = "planar"

    def weight(self) -> Tensor:
        """[O, I / groups * kh * kw] int8 with the extremes in it."""
        inputs = self.channels // self.groups
        random = torch.Generator().manual_seed(self.outputs * 31 + inputs)
        shape = (self.outputs, inputs * self.kernel[0] * self.kernel[1])
        weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
        weight[0] = 127
        weight[-1] = -127
        return weight

    def x(self) -> Tensor:
        """The input in the wanted memory layout."""
        random = torch.Generator().manual_seed(self.height * 7 + self.width + self.channels)
        b, c, h, w = self.batch, self.channels, self.height, self.width
        if self.layout == "sliced":
            return torch.randn(2 * b, c + 2, h + 1, w + 3, generator=random)[::2, 1:-1, 1:, 2:-1]
        if self.layout == "transposed":
            return torch.randn(b, c, w, h, generator=random).transpose(2, 3)
        x = torch.randn(b, c, h, w, generator=random)
        return x.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else x

    def input_range(self) -> tuple[Tensor | None, Tensor | None]:
        """(input_inverse, input_zero_point) of conv2d_int8."""
        if self.zero_point is None:
            return None, None
        if not self.per_channel:
            return torch.tensor([1 / 0.027]), torch.tensor([self.zero_point], dtype=torch.int32)
        random = torch.Generator().manual_seed(self.channels)
        inverse = 37.0 * torch.logspace(-1, 1, self.channels, base=4.0)
        zeros = torch.randint(0, 256, (self.channels,), dtype=torch.int32, generator=random)
        zeros[0] = self.zero_point
        return inverse, zeros if self.zero_point else torch.zeros_like(zeros)

    def zero_sum(self, weight: Tensor, zeros: Tensor) -> Tensor:
        """[O] int32, the sum over the weights of each output channel of weight * zero point."""
        inputs = self.channels // self.groups
        sums = weight.reshape(self.groups, self.outputs // self.groups, inputs, -1).sum(dim=3, dtype=torch.int32)
        zeros = zeros.expand(self.channels).reshape(self.groups, 1, inputs)
        return (sums * zeros).sum(dim=2, dtype=torch.int32).reshape(-1)

    def arguments(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Arguments of conv2d_int8."""
        weight = self.weight()
        random = torch.Generator().manual_seed(self.outputs)
        packed = kernels.OPS["conv2d_int8_pack"].reference(weight, self.kernel, self.groups)
        scale = torch.rand(self.outputs, generator=random) * 0.01 + 0.001
        bias = torch.randn(self.outputs, generator=random) if self.bias else None
        inverse, zeros = self.input_range()
        if inverse is not None and not self.per_channel:
            scale = scale / inverse
        geometry = (self.kernel, self.stride, self.padding, self.dilation, self.groups, self.upsample)
        x = self.x() if x is None else x
        zero_sum = self.zero_sum(weight, torch.tensor([128]) if zeros is None else zeros)
        return (
            x, packed, scale, zero_sum, bias, inverse, zeros, *geometry, self.output_padding, self.channels_last
        )  # fmt: skip


SHAPES = {
    "one value": ConvCase(batch=1, channels=1, height=1, width=1, outputs=1, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "first layer": ConvCase(channels=3, height=12, width=13, outputs=16, stride=(2, 2)),
    "square": ConvCase(channels=16, height=16, width=17, outputs=33),
    "pointwise": ConvCase(channels=20, outputs=40, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "pointwise on single pixels": ConvCase(3, 40, 1, 1, 130, (1, 1), padding=(0, 0, 0, 0)),
    "pointwise stride": ConvCase(channels=6, outputs=70, kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0)),
    "pointwise padded": ConvCase(channels=5, outputs=3, kernel=(1, 1), padding=(1, 0, 2, 1)),
    "rectangular": ConvCase(channels=4, outputs=18, kernel=(1, 7), padding=(0, 3, 0, 3)),
    "padding alone": ConvCase(
        channels=4, height=2, width=1, outputs=6, kernel=(1, 1), stride=(8, 8), padding=(3, 3, 3, 3)
    ),
    "depthwise padding alone": ConvCase(
        channels=6, height=9, width=2, outputs=6, groups=6, kernel=(2, 1), stride=(3, 30), padding=(1, 19, 1, 0)
    ),
    "even kernel": ConvCase(channels=9, outputs=16, kernel=(4, 2), stride=(3, 2), padding=(2, 0, 1, 1)),
    "dilated": ConvCase(channels=12, height=11, outputs=19, dilation=(2, 3), padding=(2, 3, 2, 3)),
    "asymmetric": ConvCase(channels=7, outputs=5, padding=(0, 3, 2, 1), stride=(2, 1)),
    "grouped": ConvCase(channels=12, outputs=40, groups=2),
    "grouped odd": ConvCase(channels=15, outputs=9, groups=3, stride=(1, 2)),
    "one input many outputs": ConvCase(channels=5, outputs=15, groups=5),
    "depthwise": ConvCase(channels=17, outputs=17, groups=17, width=18),
    "depthwise stride": ConvCase(channels=33, outputs=33, groups=33, stride=(2, 2), height=9),
    "depthwise five": ConvCase(channels=8, outputs=8, groups=8, kernel=(5, 5), padding=(2, 2, 2, 2)),
    "depthwise five stride": ConvCase(
        channels=19, outputs=19, groups=19, kernel=(5, 5), padding=(1, 2, 2, 1), stride=(2, 2)
    ),
    "depthwise dilated": ConvCase(channels=6, outputs=6, groups=6, dilation=(1, 3), padding=(1, 3, 1, 3)),
    "depthwise long": ConvCase(channels=16, outputs=16, groups=16, kernel=(2, 7), stride=(1, 3), padding=(0, 3, 1, 2)),
    "depthwise small": ConvCase(channels=50, outputs=50, groups=50, height=4, width=4),
    "upsampled": ConvCase(channels=10, outputs=12, upsample=(2, 2), padding=(1, 1, 1, 1), output_padding=(1, 0)),
    "upsampled depthwise": ConvCase(channels=6, outputs=6, groups=6, upsample=(3, 2), output_padding=(0, 1)),
}


def vary(case: ConvCase, number: int) -> ConvCase:
    """The case with another mode, layout, output format and batch: all combinations meet over many cases."""
    return replace(
        case,
        zero_point=(None, 0, 117, 255)[number % 4],
        layout=("planar", "channels_last", "sliced", "transposed")[number // 2 % 4],
        channels_last=number % 3 == 1,
        bias=number % 5 != 0,
        batch=case.batch + number % 2,
    )
