"""AdaRound: whether each weight goes up or down is learned so that the layer's output changes least.

With d = decoded - weight (a row of the error) and H = mean of x x^T over the layer's inputs, the mean squared change of
an output is d H d^T: exactly what a mean over the samples would give, so no sample is needed, a gradient costs one
product with H, and every output is a problem of its own. A weight lies between two neighbouring representable values,
low and high, of its block; a variable V per weight chooses between them:

    value = low + (high - low) * h(V),    h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1)
    minimise  d H d^T / unit + strength * sum(1 - |2 h(V) - 1|^beta)

The second term pushes h to 0 or 1; beta falls from 20 to 2, and the term is off for the first fifth of the steps. At
the end h is rounded. Scales and zero points are those of round-to-nearest under the searched range.

Source:
    Nagel et al. 2020, arXiv:2004.10568, eq. 20-25. Differs: the quadratic form stands for the layer's inputs (their
    eq. 13, not approximated by sampling; the activation function behind the layer is left out); the objective is
    divided by each row's error of rounding, so one `strength` serves every layer; neighbours are those of the format,
    so formats without equal steps work too; a row whose learned rounding is not better than round-to-nearest keeps
    round-to-nearest, and the report says how many do; where H is diagonal the nearest value is the best one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec, all_finite, from_blocks, to_blocks
from narrowcast.errors import DataError
from narrowcast.methods.base import Need, Seen, Solved, check_weight
from narrowcast.methods.options import check_numbers
from narrowcast.methods.rounding import encoded, neighbours, one_thread
from narrowcast.methods.rtn import Rtn

# h(V) reaches 0 and 1 at finite V (eq. 23)
_STRETCH = 1.2
_SHIFT = 0.1
_WARM_UP = 0.2
_BETAS = (20.0, 2.0)
_RATE = 0.1


@dataclass(frozen=True)
class AdaRound:
    """Learned rounding, layer by layer.

    Args:
        iterations: steps of gradient descent (Adam).
        strength: weight of the term that pushes every choice to one side.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    takes_levels: ClassVar[bool] = False
    iterations: int = 1000
    strength: float = 30.0

    def __post_init__(self) -> None:
        check_numbers("adaround", self, {"iterations": (1, math.inf), "strength": (0.0, math.inf)})

    def quantize(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> QuantizedTensor:
        """The record of `solve` alone."""
        return self.solve(weight, spec, seen).record

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> Solved:
        """See `WeightMethod`.

        Args:
            weight: [out, in] float, finite; may be empty.
            spec: target format; a format without scales is a cast, which is round-to-nearest.
            seen: its `hessian` [in, in], or `inputs` [n, in] of which it is made.

        Raises:
            ModelError: the weight is not a finite float matrix.
            DataError: there is neither hessian nor inputs, or they do not fit the weight.
        """
        weight = check_weight(weight)
        hessian = _hessian(seen, weight.shape[1])
        nearest = Rtn().quantize(weight, spec, seen)
        if not spec.format.scaled:
            why = "has learned levels" if spec.format.learned else "is a cast"
            return Solved(nearest, (f"{spec} {why}: rounded to nearest",))
        if weight.numel() == 0 or not bool((hessian - hessian.diag().diag()).any()):
            return Solved(nearest, ("inputs are uncorrelated: round-to-nearest is the best rounding",))
        with one_thread():
            learned = self._learn(weight, nearest, hessian)
            better = _row_errors(learned, weight, hessian) < _row_errors(nearest, weight, hessian)
        codes = nearest.codes.clone()
        codes[better] = learned.codes[better]
        kept = int((~better).sum())
        record = QuantizedTensor(codes, nearest.scale, nearest.zero_point, spec)
        note = f"{kept} of {len(better)} rows keep round-to-nearest, which learning did not improve"
        return Solved(record, (note,) if kept else ())

    def _learn(self, weight: Tensor, nearest: QuantizedTensor, hessian: Tensor) -> QuantizedTensor:
        """The record of `nearest` with every weight on the side that gradient descent chose."""
        ends = neighbours(weight, nearest)
        low, high = (_decoded(steps, nearest) for steps in ends)
        gap = high - low
        unit = (gap.square() * hessian.diag()).mean(1, keepdim=True) / 12
        unit = torch.where(unit > 0, unit, 1.0)
        part = torch.where(gap > 0, (weight - low) / gap, 0.5).clamp_(0, 1)
        choice = torch.logit((part + _SHIFT) / _STRETCH)
        mean, square = torch.zeros_like(choice), torch.zeros_like(choice)
        for step in range(1, self.iterations + 1):
            sigmoid = torch.sigmoid(choice)
            stretched = sigmoid * _STRETCH - _SHIFT
            kept = stretched.clamp(0, 1)
            gradient = (torch.addcmul(low, gap, kept) - weight) @ hessian * (2 * gap / unit)
            gradient += self._push(kept, step / self.iterations)
            gradient *= (stretched == kept) * sigmoid * (1 - sigmoid)
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square_(), 0.001)
            rate = _RATE / (1 - 0.9**step)
            choice.addcdiv_(mean, (square / (1 - 0.999**step)).sqrt_() + 1e-8, value=-rate)
        up = to_blocks(choice > 0, nearest.spec.granularity)
        return encoded(torch.where(up, ends[1], ends[0]), nearest)

    def _push(self, kept: Tensor, progress: float) -> Tensor | float:
        """The gradient in h of the second term, `progress` of the way through the steps."""
        if progress <= _WARM_UP:
            return 0.0
        start, end = _BETAS
        beta = end + (start - end) * (1 - (progress - _WARM_UP) / (1 - _WARM_UP))
        side = 2 * kept - 1
        return side.sign() * side.abs().pow_(beta - 1) * (-2 * beta * self.strength)


def _hessian(seen: Seen | None, columns: int) -> Tensor:
    """The mean of x x^T [columns, columns] float32, divided by the mean of its diagonal."""
    hessian = None if seen is None else seen.hessian
    if hessian is None and seen is not None and seen.inputs is not None and seen.inputs.shape[0]:
        inputs = seen.inputs.detach().to(torch.float64)
        hessian = inputs.t() @ inputs / inputs.shape[0]
    if hessian is None:
        raise DataError("adaround weighs rounding by the layer's inputs and has seen none; give calibration data")
    if tuple(hessian.shape) != (columns, columns):
        raise DataError(f"the Hessian has shape {tuple(hessian.shape)}, expected {(columns, columns)}: inputs x inputs")
    hessian = hessian.detach().to(torch.float64)
    if not all_finite(hessian):
        channel = int((~torch.isfinite(hessian)).any(1).nonzero()[0])
        raise DataError(f"the Hessian of input channel {channel} is not finite; check the calibration data there")
    scale = float(hessian.diag().mean()) if columns else 0.0
    return (hessian / scale if scale > 0 else hessian).to(torch.float32)


def _decoded(steps: Tensor, nearest: QuantizedTensor) -> Tensor:
    """Steps [block_rows, block_columns, elements] under the scales of `nearest` as a matrix [out, in]."""
    assert nearest.scale is not None
    return from_blocks(steps * nearest.scale.unsqueeze(-1), nearest.spec.granularity, nearest.shape)


def _row_errors(record: QuantizedTensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of every output, d H d^T, [out] float64."""
    error = record.dequantize().to(torch.float64) - weight
    return (error @ hessian.to(torch.float64) * error).sum(1)
