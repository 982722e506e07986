"""Super-blocks: the scales of 256 columns as 6-bit multiples of one float16 number.

    scale = outer * code,   code in 1..63

A float16 number times 6 bits is exact in float32, and so is that times any code less its zero point: what is stored
and what is computed with are the same numbers, and dequantizing rounds nowhere.

Source:
    The super-blocks of llama.cpp's k-quants (Q3_K, Q4_K, Q6_K). Differs: in place of a 6-bit minimum under a float16
    scale of its own, the zero point has 6 bits: it is a multiple of the 64th part of the codes (a quarter of a step at
    4 bits, a sixteenth at 2), so `value = scale * (code - zero_point)` stays the one equation, a super-block needs no
    second float16 number, and a block's smallest value is met as exactly as by a minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.core.spec import SUPER_BITS, QuantSpec

_LARGEST_CODE = 2**SUPER_BITS - 1
# A product of 11 and 6 bits leaves the last 7 bits of a float32 empty.
_EMPTY_BITS = 0x7F


def split_super_scale(scale: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """6-bit codes and one float16 outer scale for every 256 columns.

    Args:
        scale: [rows, blocks] float32, > 0.
        spec: one with the scale format "k6"; decides how many blocks share an outer scale.

    Returns:
        codes: [rows, blocks] uint8, 1..63.
        outer: [rows, ceil(blocks / blocks_in_super)] float32 with float16 values. Scales that are multiples 1..63 of a
            float16 number are given back bit for bit by codes * outer; of others the largest gets code 63, and the rest
            the nearest code.
    """
    rows, blocks = scale.shape
    together = spec.blocks_in_super
    if scale.numel() == 0:
        return scale.to(torch.uint8), scale.new_zeros(rows, -(-blocks // together))
    # a last super-block that is short repeats its last scale, which changes neither its largest nor what divides it
    last = scale[:, -1:].expand(-1, -blocks % together)
    parts = torch.cat([scale, last], 1).reshape(rows, -1, together)
    largest = parts.amax(-1)
    outer = _half_above(largest / _LARGEST_CODE)
    exact = (parts.view(torch.int32) & _EMPTY_BITS == 0).all(-1)
    for code in range(_LARGEST_CODE, 0, -1):
        if not bool(exact.any()):
            break
        tried = largest / code
        whole = (tried.to(torch.float16).to(torch.float32) == tried) & (tried * code == largest)
        whole &= ((parts / tried.unsqueeze(-1)).round() * tried.unsqueeze(-1) == parts).all(-1)
        outer = torch.where(exact & whole, tried, outer)
        exact &= ~whole
    codes = (parts / outer.unsqueeze(-1)).round().clamp(1, _LARGEST_CODE)
    return codes.reshape(rows, -1)[:, :blocks].to(torch.uint8), outer


def spread_super_scale(outer: Tensor, spec: QuantSpec, blocks: int) -> Tensor:
    """The outer scale of every block: [rows, super-blocks] to [rows, blocks]."""
    return outer.repeat_interleave(spec.blocks_in_super, 1)[:, :blocks]


def _half_above(values: Tensor) -> Tensor:
    """Float16 numbers as float32: the nearest, and where their steps are coarse, below 2^-14, the next above."""
    upwards = (values * 2.0**24).ceil().clamp(min=1) * 2.0**-24
    return torch.where(values < 2.0**-14, upwards, values.to(torch.float16).to(torch.float32))
