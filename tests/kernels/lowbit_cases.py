"""Random arguments of the low-bit linear op."""

from __future__ import annotations

import torch
from tests.kernels.linear_cases import generator
from torch import Tensor

from narrowcast.core import FORMATS, packed_width


def lowbit_arguments(
    rows: int, columns: int, depth: int, name: str = "int4", *, group: int = 32, input_group: int = 32,
    asymmetric: bool = False, bias: bool = True, half: bool = True, fused: str = "none",
) -> tuple[Tensor | int | str | None, ...]:  # fmt: skip
    """(x, weight, scale, zero_point, bias, format, group, input_group, fused)."""
    random = generator(rows, columns, depth, group, len(name))
    bits = FORMATS[name].bits
    groups = -(-depth // group) if depth else 0
    x = torch.randn(rows, depth, generator=random) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]
    if bits == 8:
        weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8, generator=random)
    else:
        width = packed_width(depth, bits)
        weight = torch.randint(0, 256, (columns, width), dtype=torch.uint8, generator=random)
    scale = torch.rand(columns, groups, generator=random) + 0.01
    zero_point = None
    if asymmetric:
        zero_point = torch.randint(0, 2**bits, (columns, groups), dtype=torch.uint8, generator=random)
    offset = torch.randn(columns, generator=random) if bias else None
    return x, weight, scale.half() if half else scale, zero_point, offset, name, group, input_group, fused
