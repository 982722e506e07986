"""The range of every block of a weight that gives the least (weighted) squared error.

For every block it chooses the scale s and the integer zero point z that minimise

    error(s, z) = sum_i h_i * (w_i - s * (code_i - z))^2,    code_i = clamp(round(w_i / s) + z, code_low, code_high)

where h_i is the importance of the input channel that w_i multiplies: the mean square of that channel over the
calibration data, 1 without data. For small changes and uncorrelated inputs, error is the mean square error of the
layer's output. Three stages; each keeps a candidate only if its error, measured with the rounded scale and the
integer zero point that will be stored, is smaller than the best so far, and the first candidate is the full range:
the result is never worse than plain round-to-nearest.

1. Shrink: s = ratio * (scale of the full range) for a grid of ratios; for each, zero points from the one that keeps
   the low end of the range to the one that keeps its high end (asymmetric formats).
2. Scale: with the codes fixed, error is quadratic in s and least at s = sum h w c / sum h c^2, c = code - z; then the
   codes are rounded again.
3. Zero point: z - 1 and z + 1, each at the scale of stage 2 for its codes.

Sums are pairwise trees of elementwise additions, so the chosen codes do not depend on threads, instruction set or
on how the blocks are cut into chunks.

Source:
    Shrunken ranges by measured error: AWQ's clip search (Lin et al. 2023, arXiv:2306.00978) and OCTAV's criterion
    (Sakr et al. 2022, arXiv:2206.06501). Importance: llama.cpp's imatrix. Alternation of codes and scale: LQ-Nets
    (Zhang et al. 2018, arXiv:1807.10029, section 3.2). Differs: both ends of the range shrink independently, the zero
    point stays an integer, and the scale is rounded to its storage format before the error is measured.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.core import (
    QuantSpec,
    block_range,
    block_shape,
    choose_scale,
    round_scale,
    round_zero_point,
    scale_shape,
    to_blocks,
)
from narrowcast.kernels.op import FLOAT_TIERS, Op
from narrowcast.kernels.reference_encode import signed_spec
from narrowcast.kernels.reference_super_blocks import share_super_scales

# Weights in one chunk; bounds the memory of the search, changes no code.
_CHUNK = 1 << 16
# Elements per elementwise operation: the buffers of one evaluation stay in a 1 MB cache.
_PIECE = 1 << 16
# Ratios of the full range. Above 1 too: a wider step with another zero point often fits a group of 32 better (measured
# on MiniLM at int4: 0.9 % less error, 2 % weighted). Finer or longer grids gain less than 0.2 % more.
_SYMMETRIC_RATIOS = tuple(1.296 - 0.016 * step for step in range(57))
_ASYMMETRIC_RATIOS = tuple(1.2 - 0.018 * step for step in range(40))
# Where between "keeps the low end" and "keeps the high end"; 5 positions gain less than 0.02 % over 3.
_ZERO_POINTS = (0.0, 0.5, 1.0)
_LARGEST_SCALE = {"fp16": 65504.0, "e8m0": 2.0**127}


@dataclass(frozen=True)
class Candidate:
    """One scale and zero point per block, and the error they give.

    Args:
        scale: [blocks] float32, as it is stored.
        zero_point: [blocks] float32, multiples of the spec's `zero_step`; None when symmetric.
        error: [blocks] float32.
    """

    scale: Tensor
    zero_point: Tensor | None
    error: Tensor

    def better_of(self, other: Candidate) -> Candidate:
        """Per block the one with the smaller error; this one where they are equal."""
        return self.taking(other, other.error < self.error)

    def taking(self, other: Candidate, wins: Tensor) -> Candidate:
        """This candidate with `other` in some blocks [blocks] bool."""
        zero_point = None
        if self.zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(wins, other.zero_point, self.zero_point)
        return Candidate(
            torch.where(wins, other.scale, self.scale), zero_point, torch.where(wins, other.error, self.error)
        )


class Blocks:
    """Blocks of a weight, elements first: all that the search needs to measure a candidate.

    Args:
        values: [blocks, elements] float32.
        importance: [blocks, elements] float32 >= 0, or None for 1 everywhere.
        spec: target format.
    """

    def __init__(self, values: Tensor, importance: Tensor | None, spec: QuantSpec) -> None:
        # [elements, blocks]: a scale per block then broadcasts along contiguous memory
        self.values = values.t().contiguous()
        self.importance = None if importance is None else importance.t().contiguous()
        self.spec = spec

    def measure(self, scale: Tensor, zero_point: Tensor | None) -> Candidate:
        """The candidate with its error; `scale` [blocks] and `zero_point` [blocks] as they would be stored."""
        sums = []
        for values, importance in self._pieces():
            deviation = self._steps(values, scale, zero_point).mul_(scale).sub_(values).square_()
            sums.append(tree_sum(deviation if importance is None else deviation.mul_(importance)))
        return Candidate(scale, zero_point, tree_sum(torch.stack(sums)))

    def least_squares(self, start: Candidate) -> Tensor:
        """The best scale [blocks] for the codes of `start`, not yet rounded; where there is none, that of `start`."""
        products, squares = [], []
        for values, importance in self._pieces():
            steps = self._steps(values, start.scale, start.zero_point)
            weighted = steps if importance is None else steps * importance
            products.append(tree_sum(weighted * values))
            squares.append(tree_sum(weighted * steps))
        scale = tree_sum(torch.stack(products)) / tree_sum(torch.stack(squares))
        return torch.where(torch.isfinite(scale) & (scale > 0), scale, start.scale)

    def _steps(self, values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Quotient value / scale after quantization: code - zero_point, in a new tensor."""
        scaled = values / scale
        if self.spec.format.kind != "int":
            return self.spec.format.decode(self.spec.format.encode(scaled))
        if zero_point is None:
            return scaled.round_().clamp_(self.spec.code_low, self.spec.code_high)
        if self.spec.zero_step != 1:
            return scaled.add_(zero_point).round_().clamp_(self.spec.code_low, self.spec.code_high).sub_(zero_point)
        return scaled.round_().clamp_(self.spec.code_low - zero_point, self.spec.code_high - zero_point)

    def _pieces(self) -> list[tuple[Tensor, Tensor | None]]:
        length = max(1, _PIECE // self.values.shape[1])
        cuts = [slice(start, start + length) for start in range(0, self.values.shape[0], length)]
        return [(self.values[cut], None if self.importance is None else self.importance[cut]) for cut in cuts]


def tree_sum(terms: Tensor) -> Tensor:
    """Sum over the first dimension in a fixed order of elementwise additions; the same bits on every machine.

    Args:
        terms: [elements, blocks] float, at least one element; overwritten.
    """
    while (count := terms.shape[0]) > 1:
        half = (count + 1) // 2
        terms[: count - half].add_(terms[half:])
        terms = terms[:half]
    return terms[0]


def search_range(
    values: Tensor, importance: Tensor | None, spec: QuantSpec, refinements: int
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every block with the least error found by the three stages of this module.

    Args:
        values: [block_rows, block_columns, elements] float32, finite, not empty; whole rows of blocks.
        importance: same shape, >= 0; None for 1 everywhere.
        spec: target format, one with scales.
        refinements: rounds of stages 2 and 3.

    Returns:
        scale:      [block_rows, block_columns] float32, as it is stored.
        zero_point: of that shape, int32, or float32 where `spec.zero_step` is below 1; None when symmetric.
    """
    down, across, elements = values.shape
    low, high = block_range(values)
    scale, zero_point = choose_scale(low, high, spec)
    flat_importance = None if importance is None else importance.reshape(-1, elements)
    blocks = Blocks(values.reshape(-1, elements), flat_importance, spec)
    plain = blocks.measure(scale.flatten(), None if zero_point is None else zero_point.flatten().to(torch.float32))
    best = _shrink(blocks, plain, low.flatten().clamp(max=0), high.flatten().clamp(min=0))
    for _ in range(refinements):
        best = _refine(blocks, best)
    if spec.scale_format == "int8":
        best = _share_outer_scale(blocks, plain, best, (down, across))
    elif spec.scale_format == "k6":
        best = share_super_scales(blocks, plain, best, (down, across))
    found = None if best.zero_point is None else round_zero_point(best.zero_point.reshape(down, across), spec)
    return best.scale.reshape(down, across), found


def _shrink(blocks: Blocks, best: Candidate, low: Tensor, high: Tensor) -> Candidate:
    """Stage 1: the grid of ratios and, between the two ends that a ratio cannot both keep, zero points."""
    spec, full = blocks.spec, best.scale
    if best.zero_point is None:
        for ratio in _SYMMETRIC_RATIOS:
            best = best.better_of(blocks.measure(_stored(full * ratio, spec), None))
        return best
    for ratio in _ASYMMETRIC_RATIOS:
        scale = _stored(full * ratio, spec)
        keeps_low = (spec.code_low - low / scale).clamp(spec.code_low, spec.code_high)
        keeps_high = (spec.code_high - high / scale).clamp(spec.code_low, spec.code_high)
        for part in _ZERO_POINTS:
            zero_point = _stored_zero(keeps_low + (keeps_high - keeps_low) * part, spec)
            best = best.better_of(blocks.measure(scale, zero_point))
    return best


def _refine(blocks: Blocks, best: Candidate) -> Candidate:
    """Stages 2 and 3, once."""
    spec = blocks.spec
    best = best.better_of(blocks.measure(_stored(blocks.least_squares(best), spec), best.zero_point))
    start = best
    if start.zero_point is None:
        return best
    for shift in (-spec.zero_step, spec.zero_step):
        zero_point = (start.zero_point + shift).clamp(spec.code_low, spec.zero_high)
        moved = blocks.measure(start.scale, zero_point)
        settled = blocks.measure(_stored(blocks.least_squares(moved), spec), zero_point)
        best = best.better_of(moved).better_of(settled)
    return best


def _stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Scales as they will be stored; those that depend on others in their row are rounded at the end."""
    if spec.scale_format in ("int8", "k6"):
        return scale
    return round_scale(scale.clamp(max=_LARGEST_SCALE.get(spec.scale_format, 3e38)), spec)


def _stored_zero(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    return round_zero_point(zero_point, spec).to(torch.float32)


def _share_outer_scale(blocks: Blocks, plain: Candidate, best: Candidate, shape: tuple[int, int]) -> Candidate:
    """`best` with 8-bit scales under one outer scale per row of blocks; `plain` in the rows where that is better."""
    rounded = blocks.measure(round_scale(best.scale.reshape(shape), blocks.spec).flatten(), best.zero_point)
    by_row = [tree_sum(candidate.error.reshape(shape).t().clone()) for candidate in (rounded, plain)]
    wins = (by_row[0] < by_row[1]).repeat_interleave(shape[1])
    zero_point = None
    if plain.zero_point is not None and rounded.zero_point is not None:
        zero_point = torch.where(wins, rounded.zero_point, plain.zero_point)
    return Candidate(
        torch.where(wins, rounded.scale, plain.scale), zero_point, torch.where(wins, rounded.error, plain.error)
    )


def search_weight(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None, refinements: int
) -> tuple[Tensor, Tensor | None]:
    """`search_range` of a whole weight, one chunk of rows per thread.

    Threads over chunks and not inside of operations: an operation on a chunk takes microseconds, and on a busy machine
    waiting for its second half takes a scheduler's time slice (measured under load, 2 cores: 2.3 against 0.4 seconds).

    Args:
        weight: [out, in] float32, finite, not empty.
        spec: target format, one with scales.
        importance: [in] float32 >= 0; None for 1 everywhere.
        refinements: rounds of stages 2 and 3.

    Returns:
        scale and zero point [block_rows, block_columns], see `search_range`.
    """
    shape = (weight.shape[0], weight.shape[1])
    tall, wide = block_shape(spec.granularity, shape)
    padded = scale_shape(spec.granularity, shape)[1] * wide
    rows = max(1, _CHUNK // (tall * padded)) * tall

    def search(start: int) -> tuple[Tensor, Tensor | None]:
        return search_range(*_blocks(weight[start : start + rows], spec, importance, tall), spec, refinements)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = list(pool.map(search, range(0, weight.shape[0], rows)))
    zero_points = [zero_point for _, zero_point in found if zero_point is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zero_points) if zero_points else None


def _blocks(part: Tensor, spec: QuantSpec, importance: Tensor | None, tall: int) -> tuple[Tensor, Tensor | None]:
    """Some rows of a weight as [block_rows, block_columns, elements], and their importance likewise or None."""
    # the last rows may be fewer than a block is tall; filled up with zeros, their blocks are like all others
    if missing := -part.shape[0] % tall:
        part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
    values = to_blocks(part, spec.granularity)
    if importance is None and spec.zero_step != 1:
        # with zero points between codes a zero that fills a block up has an error, and must not count
        importance = part.new_ones(part.shape[1])
    return values, None if importance is None else to_blocks(importance.expand(part.shape), spec.granularity)


def _search_range_op(
    weight: Tensor,
    importance: Tensor | None,
    group: int,
    bits: int,
    symmetric: bool,
    scale_format: int,
    refinements: int,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of signed integers, one per group of a row: `search_weight`."""
    scale, zero_point = search_weight(
        weight, signed_spec(bits, group, symmetric, scale_format), importance, refinements
    )
    return scale, weight.new_empty((0, 0), dtype=torch.int32) if zero_point is None else zero_point


def _fake_search(
    weight: Tensor,
    importance: Tensor | None,
    group: int,
    bits: int,
    symmetric: bool,
    scale_format: int,
    refinements: int,
) -> tuple[Tensor, Tensor]:
    shape = (weight.shape[0], -(-weight.shape[1] // group))
    return weight.new_empty(shape), weight.new_empty((0, 0) if symmetric else shape, dtype=torch.int32)


OPS = (
    Op(
        "search_range",
        "(Tensor weight, Tensor? importance, int group, int bits, bool symmetric, int scale_format,"
        " int refinements) -> (Tensor, Tensor)",
        _search_range_op,
        _fake_search,
        FLOAT_TIERS,
    ),
)
