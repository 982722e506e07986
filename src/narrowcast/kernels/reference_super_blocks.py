"""The last stage of the range search in super-blocks: scales that were found one by one under shared float16 numbers.

A candidate for the outer scale of 256 columns rounds the scales of its blocks to 6 bits; the one with the least
(weighted) error of the whole super-block wins, the full range's own among them. Then, with the outer scale fixed, every
block moves its 6-bit scale and zero point by one as long as that lowers its error.

Source:
    llama.cpp's k-quants choose the outer scale from the largest one, then fit codes to the decoded scales. Differs:
    outer scales around that one compete by measured error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from narrowcast.core import QuantSpec, round_scale, split_super_scale, spread_super_scale

if TYPE_CHECKING:
    from narrowcast.kernels.reference_search import Blocks, Candidate

# Of the outer scale that gives the largest scale of a super-block the code 63; a smaller one clips it, a larger one
# leaves codes unused, and either may fit the others better.
_RATIOS = (1.0, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06, 1.09, 1.12)
_ROUNDS = 2
_LARGEST_CODE = 63
_OUTER = (2.0**-24, 65504.0)


def share_super_scales(blocks: Blocks, plain: Candidate, best: Candidate, shape: tuple[int, int]) -> Candidate:
    """`best` as it can be stored.

    Args:
        blocks: [block_rows * block_columns] of them.
        plain: the full range, as it is stored.
        best: scales as they were found, not yet rounded.
        shape: (block_rows, block_columns).

    Returns:
        A candidate whose scales the format holds; of no super-block is the error above that of `plain`.
    """
    found = best.scale.reshape(shape).clamp(max=_LARGEST_CODE * _OUTER[1])
    chosen = plain
    for ratio in _RATIOS:
        scale = _rounded(found, blocks.spec, ratio).flatten()
        chosen = _better_super(chosen, blocks.measure(scale, best.zero_point), blocks.spec, shape)
    return _polished(blocks, chosen, shape)


def _rounded(found: Tensor, spec: QuantSpec, ratio: float) -> Tensor:
    """Scales [block_rows, block_columns] as multiples of outer scales of this part of the usual ones."""
    _, outer = split_super_scale(found, spec)
    outer = (outer * ratio).clamp(*_OUTER).to(torch.float16).to(torch.float32)
    spread = spread_super_scale(outer, spec, found.shape[1])
    return round_scale((found / spread).round().clamp(1, _LARGEST_CODE) * spread, spec)


def _better_super(one: Candidate, other: Candidate, spec: QuantSpec, shape: tuple[int, int]) -> Candidate:
    """Per super-block the one with the smaller error; `one` where they are equal."""
    down, across = shape
    together = spec.blocks_in_super
    errors = []
    for candidate in (one, other):
        padded = pad(candidate.error.reshape(shape), (0, -across % together)).reshape(down, -1, together)
        errors.append(padded.to(torch.float64).sum(-1))
    wins = (errors[1] < errors[0]).repeat_interleave(together, 1)[:, :across].flatten()
    return one.taking(other, wins)


def _polished(blocks: Blocks, best: Candidate, shape: tuple[int, int]) -> Candidate:
    """Blocks with their scale's code and their zero point moved by one where that is better."""
    spec = blocks.spec
    for _ in range(_ROUNDS):
        codes, outer = split_super_scale(best.scale.reshape(shape), spec)
        spread, start = spread_super_scale(outer, spec, shape[1]), best
        for move in (-1, 0, 1):
            scale = ((codes.to(torch.float32) + move).clamp(1, _LARGEST_CODE) * spread).flatten()
            if start.zero_point is None:
                best = best.better_of(blocks.measure(scale, None))
                continue
            for shift in (-spec.zero_step, 0.0, spec.zero_step):
                zero_point = (start.zero_point + shift).clamp(spec.code_low, spec.zero_high)
                best = best.better_of(blocks.measure(scale, zero_point))
    return best
