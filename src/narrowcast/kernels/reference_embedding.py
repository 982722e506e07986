"""Torch body of the embedding op: look rows up, then dequantize only those."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.kernels.op import FLOAT_TIERS, Op
from narrowcast.kernels.reference_weight_only import dequantize_weight


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


def embedding_rows(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    """Rows of a table of any stored format as float32.

    Args:
        indices: [...] int64 or int32 row numbers.
        codes: the table, see `dequantize_weight`; so is the rest.
        scale: its scales.
        zero_point: its zero points or None.
        levels: its levels or None.
        bits: of its codes.
        group: columns per scale.
        columns: of the table.

    Returns:
        [..., columns] float32.

    Raises:
        RuntimeError: an index is out of range; the message names it and its position.
    """
    flat = _flat_indices("embedding_rows", indices, codes.shape[0])
    parts = [part if part is None or part.shape[0] == 1 else part[flat] for part in (scale, zero_point)]
    assert parts[0] is not None
    tables = levels[flat] if levels is not None and levels.dim() == 3 else levels
    rows = dequantize_weight(codes[flat], parts[0], parts[1], tables, bits, group, columns)
    return rows.reshape(*indices.shape, columns)


def _fake(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    levels: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    return codes.new_empty((*indices.shape, columns), dtype=torch.float32)


OPS = (
    Op(
        "embedding_rows",
        "(Tensor indices, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? levels, int bits, int group,"
        " int columns) -> Tensor",
        embedding_rows,
        _fake,
        FLOAT_TIERS,
    ),
)
