"""The float weight that training starts from where a solver chose codes that are not the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, from_blocks, quantize_blocks, to_blocks


def start_at_codes(weight: Tensor, factor: Tensor | float, start: QuantizedTensor) -> Tensor:
    """The float weight, and what a code stands for wherever it is not that of the float weight.

    Solvers choose codes that are not the nearest, each to make up for the error of others; training goes on from their
    choice. It starts in the middle of a code's cell: at the edge that is nearest to the float weight, the smallest
    first step would undo the choice of a third of all weights at once, in no order.

    Args:
        weight: [rows, columns] float32.
        factor: what the weight is multiplied by before it is quantized: a number, or broadcastable to the weight.
        start: its record.

    Returns:
        [rows, columns], which rounds to the codes of `start`.
    """
    assert start.scale is not None
    spec = start.spec
    blocks, codes = to_blocks(weight * factor, spec.granularity), to_blocks(start.codes, spec.granularity)
    nearest = quantize_blocks(blocks, spec, start.scale, start.zero_point)
    other = from_blocks(nearest.view(torch.uint8) != codes.view(torch.uint8), spec.granularity, start.shape)
    return torch.where(other, start.dequantize() / factor, weight)
