"""Pure torch bodies of the dequantize ops and what the linear ones share: they define what the native kernels compute.

Integers are multiplied in float64, which is exact below 2**53 and much faster in torch than int64. Every float step
is one float32 operation in a fixed order (no fused multiply-add), so that all tiers round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_RANGE = 2.0**-100
"""A row (or group) whose largest magnitude is below this counts as all zero: 127 / range would overflow."""


def check_finite(op: str, rows: Tensor) -> None:
    """Raise if a row of `rows` [M, K] has a NaN or an infinity; the message names the first such row."""
    bad = ~torch.isfinite(rows).all(dim=1)
    if bool(bad.any()):
        raise RuntimeError(f"narrowcast.{op}: Non-finite value in row {int(bad.nonzero()[0])} of x")


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row.

    Args:
        rows: [M, K] float32, finite.

    Returns:
        codes: [M, K] float32 holding integers in -127..127.
        scale: [M] float32, absmax / 127; 1.0 where the row counts as zero.
    """
    if rows.shape[1] == 0:
        return rows, torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)
    absmax = rows.abs().amax(dim=1)
    zero = absmax < SMALLEST_RANGE
    # A division of two tensors: torch computes `127.0 / tensor` as reciprocal times 127, which rounds twice.
    largest = torch.tensor(127.0, dtype=torch.float32, device=rows.device)
    inverse = torch.where(zero, 0.0, torch.div(largest, torch.where(zero, 1.0, absmax)))
    scale = torch.where(zero, 1.0, torch.div(absmax, largest))
    return torch.round(rows * inverse[:, None]).clamp(-127, 127), scale


def quantize_rows_asymmetric(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric uint8 codes of each row; its range is widened to contain 0.

    Args:
        rows: [M, K] float32, finite.

    Returns:
        codes: [M, K] float32 holding integers in 0..255.
        scale: [M] float32, (high - low) / 255; 1.0 where the row counts as zero.
        zero_point: [M] int32 in 0..255, the code of 0.0.
    """
    if rows.shape[1] == 0:
        return rows, rows.new_ones(rows.shape[0]), rows.new_zeros(rows.shape[0], dtype=torch.int32)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    zero = torch.maximum(-low, high) < SMALLEST_RANGE
    steps = torch.tensor(255.0, dtype=torch.float32, device=rows.device)
    # divided before subtracted: high - low may overflow where neither bound does
    scale = torch.where(zero, 1.0, torch.div(high, steps) - torch.div(low, steps))
    inverse = torch.where(zero, 0.0, torch.div(torch.ones_like(scale), scale))
    zero_point = torch.round(-low * inverse).clamp(max=255)
    shifted = (rows * inverse[:, None]).clamp(-zero_point[:, None], 255 - zero_point[:, None])
    return torch.round(shifted) + zero_point[:, None], scale, zero_point.to(torch.int32)


LONGEST_SUM = 1 << 16
"""Products that one integer sum may add: 255 * 128 of each is at most 2^31 - 2^23, so int32 holds every such sum."""


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact codes [M, K] times weight [N, K] transposed, as int32 [M, N]."""
    return torch.matmul(codes.double(), weight.double().t()).to(torch.int32)


def add_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 rows [M, N] plus the bias in float32."""
    return rows if bias is None else rows + bias.float()


def round_to(rows: Tensor, x: Tensor) -> Tensor:
    """Rows [M, N] in x's dtype with x's leading dimensions."""
    return rows.to(x.dtype).reshape(*x.shape[:-1], rows.shape[1])


def finite_rows(op: str, x: Tensor) -> Tensor:
    """X as finite float32 rows [M, K]."""
    rows = x.float().reshape(x[..., 0].numel() if x.shape[-1] else x.shape[:-1].numel(), x.shape[-1])
    check_finite(op, rows)
    return rows
