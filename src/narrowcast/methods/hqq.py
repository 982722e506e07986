"""HQQ: scales and zero points under an error that forgives a few large deviations, found without data.

Half-quadratic quantization minimises sum |w - s (c - z)|^p over each block. An auxiliary error e splits that into two
easy steps; with x = w / s, levels u = c - z and r = x - u, all in code steps:

    e = sign(r) max(0, |r| - |r|^(p-1) / beta)           the part of r that is given up (generalised shrinkage)
    z += mean(u - (x - e)),   s *= sum(u (x - e)) / sum(u^2)        the fit to what is left

and beta grows by a constant factor, so that less and less is shrunk away and more is given up.

Source:
    Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", eq. 5-8. Differs: zero points
    are stored as integers, so z is rounded and both neighbours are tried; alone, a rounded z hardly ever moves from
    the full range's, so the scale, which the paper keeps, is fitted with it. r is in code steps, so that beta means
    the same for weights of any size. Every candidate is measured as it would be stored, and the best is kept. The
    paper's p = 0.7 was the worst of those tried on stories260K, see `Hqq`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrowcast.core import (
    QuantizedTensor,
    QuantSpec,
    block_range,
    choose_scale,
    dequantize_blocks,
    quantize_blocks,
    round_scale,
    round_zero_point,
    to_blocks,
)
from narrowcast.errors import RecipeError
from narrowcast.methods.base import Need, Seen, Solved, check_weight
from narrowcast.methods.native import round_to_nearest
from narrowcast.methods.rtn import Rtn


@dataclass(frozen=True)
class Hqq:
    """Half-quadratic quantization.

    Args:
        norm: p of the error that is minimised, above 0 and at most 2. Perplexity of stories260K on 32 held-out
            stories in int4/channel, and in groups of 32 at 4, 3 and 2 bits, all asymmetric: p = 0.7: 4.49, 4.26, 8.97,
            118; 1: 4.42, 4.18, 7.79, 106; 1.3: 4.34, 4.17, 7.00, 83; 1.6: 4.39, 4.17, 6.62, 86.
        beta: how much of the error is given up at the start, in code steps.
        growth: factor of beta per iteration.
        iterations: of both steps.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    takes_levels: ClassVar[bool] = False
    norm: float = 1.3
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        limits = {"norm": (0, 2), "beta": (0, 1e6), "growth": (0, 10)}
        for name, (above, most) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
                raise RecipeError(f"hqq: {name} is {value!r}; use a number above {above} and at most {most:g}")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0:
            raise RecipeError(f"hqq: iterations is {self.iterations!r}; use a whole number >= 0")

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> Solved:
        """The nearest codes under the scales and zero points with the least error found.

        Args:
            weight: [out, in] float, finite; may be empty.
            spec: target format; any format, granularity and scale format.
            seen: not used, but for learned levels, which are those of `Rtn`.

        Returns:
            A record whose error, to the power `norm`, is at most that of the full range in every block; with scales
            that hang together (scale:int8, scale:k6), in the sum over every row of blocks.

        Raises:
            ModelError: the weight is not a finite float matrix.
            FormatError: a scale is larger than the scale format can hold.
        """
        weight = check_weight(weight)
        if spec.format.learned:
            return Solved(Rtn().quantize(weight, spec, seen), (f"{spec} has learned levels: rounded to nearest",))
        if not spec.format.scaled or weight.numel() == 0:
            why = f"{spec} has no scales" if weight.numel() else "the weight is empty"
            return Solved(round_to_nearest(weight, spec), (f"{why}: rounded to nearest",))
        inside = to_blocks(torch.ones_like(weight), spec.granularity)
        blocks = _Blocks(to_blocks(weight, spec.granularity), inside, spec, self.norm)
        plain = best = current = blocks.measure(*choose_scale(*block_range(blocks.values), spec))
        beta = self.beta
        for _ in range(self.iterations):
            current = blocks.step(current, beta)
            best = best.better_of(current)
            beta *= self.growth
        if spec.scale_format in ("int8", "k6"):
            best = plain.better_of(blocks.measure(round_scale(best.scale, spec), best.zero_point), by_row=True)
        return Solved(round_to_nearest(weight, spec, best.scale, best.zero_point))

    def quantize(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> QuantizedTensor:
        """The record of `solve` alone."""
        return self.solve(weight, spec, seen).record


@dataclass(frozen=True)
class _Candidate:
    """Scales and zero points as they are stored, and their error, each [block_rows, block_columns]."""

    scale: Tensor
    zero_point: Tensor | None
    error: Tensor

    def better_of(self, other: _Candidate, *, by_row: bool = False) -> _Candidate:
        """Per block, or per row of blocks, the one with the smaller error; this one where they are equal."""
        wins = other.error < self.error
        if by_row:
            wins = (other.error.sum(1, keepdim=True) < self.error.sum(1, keepdim=True)).expand(wins.shape)
        zero_point = self.zero_point
        if zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(wins, other.zero_point, zero_point)
        scale, error = torch.where(wins, other.scale, self.scale), torch.where(wins, other.error, self.error)
        return _Candidate(scale, zero_point, error)


@dataclass(frozen=True)
class _Blocks:
    """A weight in block view.

    Args:
        values: [block_rows, block_columns, elements] float32.
        inside: same shape, 1 where there is a weight and 0 where the block reaches over the edge.
        spec: target format.
        norm: p of the error.
    """

    values: Tensor
    inside: Tensor
    spec: QuantSpec
    norm: float

    def measure(self, scale: Tensor, zero_point: Tensor | None) -> _Candidate:
        """The candidate with its error, the sum of |w - stored|^p."""
        error = (self.values - scale.unsqueeze(-1) * self.levels(scale, zero_point)) * self.inside
        return _Candidate(scale, zero_point, error.abs().pow(self.norm).sum(-1))

    def levels(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """What the nearest codes stand for in code steps, same shape as `values`."""
        codes = quantize_blocks(self.values, self.spec, scale, zero_point)
        return dequantize_blocks(codes, self.spec, torch.ones_like(scale), zero_point)

    def step(self, now: _Candidate, beta: float) -> _Candidate:
        """Give up a part of the error, then fit zero point and scale to the rest."""
        scaled = self.values / now.scale.unsqueeze(-1)
        levels = self.levels(now.scale, now.zero_point)
        error = scaled - levels
        size = error.abs()
        kept = scaled - error.sign() * (size - size.clamp(min=1e-6).pow(self.norm - 1) / beta).clamp(min=0)
        if now.zero_point is None:
            return self.measure(self._fitted(now.scale, levels, kept), None)
        drift = ((levels - kept) * self.inside).sum(-1) / self.inside.sum(-1)
        found: _Candidate | None = None
        for offset in (0, -1, 1):
            zero_point = round_zero_point(now.zero_point + drift + offset * self.spec.zero_step, self.spec)
            moved = levels - (zero_point - now.zero_point).unsqueeze(-1)
            tried = self.measure(self._fitted(now.scale, moved, kept), zero_point)
            found = tried if found is None else found.better_of(tried)
        assert found is not None
        return found

    def _fitted(self, scale: Tensor, levels: Tensor, kept: Tensor) -> Tensor:
        """The scale that brings levels nearest to what is kept; the present one where there is none."""
        levels = levels * self.inside
        fitted = scale * (levels * kept).sum(-1) / levels.square().sum(-1)
        usable = torch.isfinite(fitted) & (fitted > 0)
        # twice the full range's scale is of no use, and a scale format may end there
        fitted = torch.where(usable, torch.minimum(fitted, 2 * scale), scale)
        # scales that depend on others in their row are rounded at the end
        return fitted if self.spec.scale_format in ("int8", "k6") else round_scale(fitted, self.spec)
