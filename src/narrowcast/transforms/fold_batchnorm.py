"""BatchNorm in evaluation mode is a scale and a shift per channel: both go into the weight and bias before it.

    gamma * (W x + b - mean) / sqrt(var + eps) + beta = (f W) x + (f (b - mean) + beta),   f = gamma / sqrt(var + eps)

Source:
    Jacob et al. 2018, arXiv:1712.05877, section 3.2, eq. 14. Differs: computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchNormStatistics:
    """What a BatchNorm layer does in evaluation mode; all tensors are [channels] float.

    Args:
        mean, variance: running statistics.
        gamma, beta: learned scale and shift, or None (1 and 0).
        epsilon: added to the variance.
    """

    mean: Tensor
    variance: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    epsilon: float

    def factor(self) -> Tensor:
        """F = gamma / sqrt(variance + epsilon), [channels] float64."""
        factor = torch.rsqrt(self.variance.double() + self.epsilon)
        return factor if self.gamma is None else factor * self.gamma.double()


def fold_batchnorm(weight: Tensor, bias: Tensor | None, statistics: BatchNormStatistics) -> tuple[Tensor, Tensor]:
    """The weight and bias that do the work of a layer and the BatchNorm after it.

    Args:
        weight: [channels, ...] float, the output channel first.
        bias: [channels] float or None.
        statistics: the BatchNorm.

    Returns:
        weight: like `weight`.
        bias: [channels] in the dtype of `weight`.
    """
    factor = statistics.factor()
    shift = -statistics.mean.double() if bias is None else bias.double() - statistics.mean.double()
    folded_bias = shift * factor
    if statistics.beta is not None:
        folded_bias = folded_bias + statistics.beta.double()
    folded = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), folded_bias.to(weight.dtype)
