"""The float weight that training starts from where a solver chose codes that are not the nearest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, from_blocks, quantize_blocks, to_blocks


def start_inside_cells(weight: Tensor, factor: Tensor | float, start: QuantizedTensor) -> Tensor:
    """The float weight nearest to `weight` that rounds to the codes of `start`.

    Solvers choose codes that are not the nearest; training goes on from their choice.

    Args:
        weight: [rows, columns] float32.
        factor: what the weight is multiplied by before it is quantized: a number, or broadcastable to the weight.
        start: its record.

    Returns:
        [rows, columns]: changed where weight * factor has another code, to 0.001 steps inside the code's cell.
    """
    assert start.scale is not None
    spec, shape = start.spec, start.shape
    blocks = to_blocks(weight * factor, spec.granularity)
    codes = to_blocks(start.codes, spec.granularity)
    moved = quantize_blocks(blocks, spec, start.scale, start.zero_point).view(torch.uint8) != codes.view(torch.uint8)
    if spec.format.kind == "int":
        steps = codes.to(torch.float32)
        zero = 0.0 if start.zero_point is None else start.zero_point.unsqueeze(-1).to(torch.float32)
        low = torch.where(steps <= spec.code_low, -math.inf, steps - zero - 0.499) * start.scale.unsqueeze(-1)
        high = torch.where(steps >= spec.code_high, math.inf, steps - zero + 0.499) * start.scale.unsqueeze(-1)
        inside = torch.minimum(torch.maximum(blocks, low), high)
    else:
        inside = spec.format.decode(codes) * start.scale.unsqueeze(-1)
    changed = from_blocks(moved, spec.granularity, shape)
    return torch.where(changed, from_blocks(inside, spec.granularity, shape) / factor, weight)
