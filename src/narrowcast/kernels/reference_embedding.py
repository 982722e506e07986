"""Pure torch bodies of the embedding ops: look rows up, then dequantize only those."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.kernels.op import DEQUANTIZE_TIERS, Op
from narrowcast.kernels.reference import dequantize_int4, dequantize_int8


def _flat_indices(op: str, indices: Tensor, rows: int) -> Tensor:
    """The indices as one int64 row, each within 0..rows - 1."""
    flat = indices.reshape(-1).long()
    bad = (flat < 0) | (flat >= rows)
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        raise RuntimeError(
            f"narrowcast.{op}: index {int(flat[position])} at position {position} is not in 0..{rows - 1}"
        )
    return flat


def embedding_int8(indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Rows of an int8 table as float32.

    Args:
        indices: [...] int64 or int32 row numbers.
        weight:  [V, D] int8.
        scale:   [V] float32, one per row.
        zero_point: [V] uint8, the code of 0.0 with 128 added; None for symmetric codes.

    Returns:
        [..., D] float32: (code - zero point) * scale.

    Raises:
        RuntimeError: an index is out of range; the message names it and its position.
    """
    flat = _flat_indices("embedding_int8", indices, weight.shape[0])
    zeros = None if zero_point is None else zero_point[flat]
    return dequantize_int8(weight[flat], scale[flat], zeros).reshape(*indices.shape, weight.shape[1])


def embedding_int4(
    indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, dim: int
) -> Tensor:
    """Rows of a packed int4 table as float32.

    Args:
        indices:    [...] int64 or int32 row numbers.
        weight:     [V, ceil(dim / 2)] uint8, two unsigned nibbles per byte, the first in the low half.
        scale:      [V, ceil(dim / group)] float16.
        zero_point: [V, ceil(dim / group)] uint8, or None for 8.
        group:      columns per scale: even, or at least dim.
        dim:        columns of the table.

    Returns:
        [..., dim] float32: (nibble - zero_point) * scale.

    Raises:
        RuntimeError: an index is out of range; the message names it and its position.
    """
    flat = _flat_indices("embedding_int4", indices, weight.shape[0])
    zeros = None if zero_point is None else zero_point[flat]
    return dequantize_int4(weight[flat], scale[flat], zeros, group, dim).reshape(*indices.shape, dim)


def _fake_int8(indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    return scale.new_empty((*indices.shape, weight.shape[1]))


def _fake_int4(
    indices: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, dim: int
) -> Tensor:
    return scale.new_empty((*indices.shape, dim), dtype=torch.float32)


OPS = (
    Op(
        "embedding_int8",
        "(Tensor indices, Tensor weight, Tensor scale, Tensor? zero_point=None) -> Tensor",
        embedding_int8,
        _fake_int8,
        DEQUANTIZE_TIERS,
    ),
    Op(
        "embedding_int4",
        "(Tensor indices, Tensor weight, Tensor scale, Tensor? zero_point, int group, int dim) -> Tensor",
        embedding_int4,
        _fake_int4,
        DEQUANTIZE_TIERS,
    ),
)
