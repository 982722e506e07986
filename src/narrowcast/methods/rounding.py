"""A weight whose rounding and ranges are trained: what methods that learn by gradient share; knows no loss.

For every element w of a block with scale s and zero point z,

    code = clamp(round(w / s + v) + z, code_low, code_high),    value = s * (code - z)

where the offset v, in code steps, is trained, and so are both ends of every block's range. Ends are moved in steps of
the starting range:

    low = s0 * (code_low - z0 + a),  high = s0 * (code_high - z0 + b),
    s = stored((high - low) / (code_high - code_low)),  z = round(code_low - low / s)

`stored` is the rounding of the scale format, so what is trained is what is saved, bit for bit. Symmetric formats have
one end: s = stored(s0 * (1 + b / high)). Formats without equal steps (NF4, FP4, FP8) are rounded in the position
domain: the position of x = w / s is the index of the level below it plus the part of the gap that x has covered, and
value = s * level[clamp(round(position + v))].

Gradients go straight through every rounding: d value / d v = s; those of scale and zero point are in `core.rounding`.

Source:
    Offsets and range factors: AutoRound (Cheng et al. 2023, arXiv:2309.05516, eq. 3). Gradient of the scale: LSQ
    (Esser et al. 2019, arXiv:1902.08153), of the zero point: LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576). Differs:
    the ends move by steps and from a searched range, not as factors in [0, 1] of the full range; the scale is rounded
    to its format and the zero point to its own in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import (
    QuantizedTensor,
    QuantSpec,
    distinct_levels,
    from_blocks,
    integer_steps_,
    range_gradients,
    round_zero_point,
    through,
    to_blocks,
)

# A scale that training shrinks further would lose the block; the full range is at most code_high times the scale.
_SMALLEST_RATIO = 0.05
_LARGEST_RATIO = 4.0
# Half of the largest float16: no scale grows beyond it, so none outgrows its format.
_LARGE_SCALE = 2.0**15


class LearnedWeight:
    """One weight in training.

    Args:
        weight: [out, in] float32, finite, not empty.
        start: its codes at the start, in a format with scales; offsets are zero where they are the nearest codes.

    Attributes:
        offset: [block_rows, block_columns, elements] trained rounding offsets in steps.
        ends: [1 or 2, block_rows, block_columns] trained shifts of the ends of the range in steps.
    """

    def __init__(self, weight: Tensor, start: QuantizedTensor) -> None:
        assert start.scale is not None
        self.spec = start.spec
        self.shape = (weight.shape[0], weight.shape[1])
        self.blocks = to_blocks(weight, self.spec.granularity)
        self.start_scale = start.scale
        self.largest_scale = torch.minimum(start.scale * _LARGEST_RATIO, start.scale.clamp(min=_LARGE_SCALE))
        self.start_zero = None if start.zero_point is None else start.zero_point.to(torch.float32)
        self.levels = None if self.spec.format.kind == "int" else distinct_levels(self.spec.format)
        self.offset = torch.zeros_like(self.blocks, requires_grad=True)
        ends = (1 if self.start_zero is None else 2, *start.scale.shape)
        self.ends = torch.zeros(ends, dtype=torch.float32, requires_grad=True)

    def weight(self) -> Tensor:
        """The dequantized weight [out, in], differentiable in `offset` and `ends`."""
        scale, zero = self._range()
        values: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            self.blocks, self.offset, scale, zero, self.spec, self.levels
        )
        return from_blocks(values, self.spec.granularity, self.shape)

    def record(self) -> QuantizedTensor:
        """The codes, scales and zero points whose dequantized form is `weight()`, bit for bit."""
        with torch.no_grad():
            scale, zero = self._range()
            steps, _ = _round(self.blocks / scale.unsqueeze(-1), self.offset, zero, self.spec, self.levels)
        return _encoded(steps, scale, zero, self.spec, self.shape)

    def _range(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point, both [block_rows, block_columns] float32, as they are stored."""
        spec = self.spec
        smallest, largest = self.start_scale * _SMALLEST_RATIO, self.largest_scale
        if self.start_zero is None:
            scale = self.start_scale * (1 + self.ends[0] / spec.format.high)
            return through(torch.clamp(scale, smallest, largest), spec), None
        codes = spec.code_high - spec.code_low
        scale = self.start_scale * (1 + (self.ends[1] - self.ends[0]) / codes)
        scale = through(torch.clamp(scale, smallest, largest), spec)
        low = self.start_scale * (spec.code_low - self.start_zero + self.ends[0])
        return scale, through(torch.clamp(spec.code_low - low / scale, spec.code_low, spec.zero_high), spec, zero=True)


def _round(
    scaled: Tensor, offset: Tensor, zero: Tensor | None, spec: QuantSpec, levels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Code minus zero point (or the level) of w / s [.., elements], and the gap between levels; 0 where clamped."""
    if levels is not None:
        return _round_to_levels(scaled, offset, levels)
    steps, inside = integer_steps_(scaled + offset, zero, spec)
    return steps, inside.to(torch.float32)


def _round_to_levels(scaled: Tensor, offset: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    last = levels.numel() - 1
    below = (torch.searchsorted(levels, scaled.contiguous(), right=True) - 1).clamp_(0, last - 1)
    gap = (levels[1:] - levels[:-1])[below]
    index = (below + (scaled - levels[below]) / gap + offset).round_()
    kept = index.clamp(0, last)
    return levels[kept.to(torch.int64)], gap * (index == kept)


def neighbours(weight: Tensor, record: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """The representable values below and above every weight under the scales of a record, in steps.

    Args:
        weight: [out, in] float32.
        record: a quantized form of it, in a format with scales.

    Returns:
        Code minus zero point (or the level) of both, [block_rows, block_columns, elements] each; where the weight lies
        outside the range of its block both are the nearer end.
    """
    assert record.scale is not None
    spec = record.spec
    scaled = to_blocks(weight, spec.granularity) / record.scale.unsqueeze(-1)
    if spec.format.kind != "int":
        levels = distinct_levels(spec.format)
        below = torch.searchsorted(levels, scaled, right=True) - 1
        last = levels.numel() - 1
        return levels[below.clamp(0, last)], levels[(below + (scaled != levels[below])).clamp(0, last)]
    shift = torch.zeros(()) if record.zero_point is None else record.zero_point.unsqueeze(-1).to(torch.float32)
    if spec.zero_step != 1:
        scaled = scaled + shift
        ends = scaled.floor(), scaled.ceil()
    else:
        ends = scaled.floor() + shift, scaled.ceil() + shift
    below, above = (codes.clamp(spec.code_low, spec.code_high) - shift for codes in ends)
    return below, above


def encoded(steps: Tensor, record: QuantizedTensor) -> QuantizedTensor:
    """A record with other codes: steps [block_rows, block_columns, elements] as `neighbours` gives them."""
    assert record.scale is not None
    zero = None if record.zero_point is None else record.zero_point.to(torch.float32)
    return _encoded(steps, record.scale, zero, record.spec, record.shape)


def _encoded(
    steps: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, shape: tuple[int, int]
) -> QuantizedTensor:
    codes = spec.format.encode(steps if zero is None else steps + zero.unsqueeze(-1))
    zero_point = None if zero is None else round_zero_point(zero, spec)
    return QuantizedTensor(from_blocks(codes, spec.granularity, shape), scale, zero_point, spec)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs its body on one thread: sums split over threads differ in the last bit, and training makes codes of that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Rounded(torch.autograd.Function):
    """value = s * (code - z), and its gradient in offset, scale and zero point."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Tensor, offset: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec,
        levels: Tensor | None,
    ) -> Tensor:  # fmt: skip
        scaled = blocks / scale.unsqueeze(-1)
        steps, gap = _round(scaled, offset, zero, spec, levels)
        ctx.save_for_backward(scaled, steps, gap, scale)
        ctx.asymmetric = zero is not None
        return steps * scale.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        scaled, steps, gap, scale = ctx.saved_tensors
        inside = gap > 0
        in_steps = gradient * scale.unsqueeze(-1)
        of_scale, of_zero = range_gradients(gradient, steps, scaled, inside, scale)
        return None, in_steps * gap, of_scale, of_zero if ctx.asymmetric else None, None, None
