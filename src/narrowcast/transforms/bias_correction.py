"""Bias correction: take the mean error that quantization leaves in every output channel out through the bias.

    E[W x] - E[Wq x] = (W - Wq) E[x]

The empirical variant measures the left side on a sample. The analytic one needs no data: behind a BatchNorm and a ReLU
an input channel is a Gaussian with BatchNorm's own mean and deviation, cut off at 0 (and at 6 for ReLU6), whose mean
is known.

Source:
    Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix C. Empirical variant, differs: each layer is corrected
    on its own float inputs, and the measured mean is shrunk by its uncertainty (James & Stein 1961), so a small sample
    cannot put its own noise into the bias. Analytic variant, as in the paper: zeros that pad an image are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.core import spread_channels

# Below this many positions the mean of an error says more of the sample than of the layer.
SMALLEST_SAMPLE = 64


@dataclass(frozen=True)
class ChannelError:
    """The error of a layer's output on a sample, per output channel.

    Args:
        positions: outputs per channel in the sample.
        mean:      [channels] mean of expected - got.
        square:    [channels] mean of its square.
    """

    positions: int
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, expected: Tensor, got: Tensor, channel_dim: int) -> ChannelError:
        """The error between two outputs of the same shape, channels at `channel_dim`."""
        error = expected.float() - got.float()
        dims = [dim for dim in range(error.dim()) if dim != channel_dim % error.dim()]
        positions = error.numel() // max(error.shape[channel_dim], 1)
        return cls(positions, error.mean(dims), error.square().mean(dims))

    def correction(self) -> Tensor | None:
        """What to add to the bias, [channels] float32; None where the sample is too small."""
        if self.positions < SMALLEST_SAMPLE:
            return None
        uncertainty = (self.square - self.mean.square()).clamp(min=0) / self.positions
        shrink = 1 - uncertainty / self.mean.square().clamp(min=torch.finfo(torch.float32).tiny)
        return self.mean * shrink.clamp(min=0)

    def total(self, correction: Tensor | None) -> float:
        """Sum over channels of the mean square error that is left with a correction."""
        if correction is None:
            return float(self.square.sum())
        return float((self.square - 2 * correction * self.mean + correction.square()).sum())


def clipped_normal_mean(mean: Tensor, deviation: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """Mean of a Gaussian variable after clipping to [low, high], per channel.

    Args:
        mean: [channels] of the Gaussian.
        deviation: [channels] its standard deviation, >= 0; 0 is a constant.
        low: 0 for ReLU and ReLU6, -inf for no lower bound.
        high: 6 for ReLU6, inf for none.

    Returns:
        [channels] float64.
    """
    mean, deviation = mean.double(), deviation.double().clamp(min=torch.finfo(torch.float64).tiny)
    total = torch.zeros_like(mean)
    below, above = torch.zeros_like(mean), torch.ones_like(mean)  # probability up to each bound
    density_low, density_high = torch.zeros_like(mean), torch.zeros_like(mean)
    if math.isfinite(low):
        z = (low - mean) / deviation
        below, density_low = torch.special.ndtr(z), _density(z)
        total = total + low * below
    if math.isfinite(high):
        z = (high - mean) / deviation
        above, density_high = torch.special.ndtr(z), _density(z)
        total = total + high * (1 - above)
    return total + mean * (above - below) + deviation * (density_low - density_high)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def analytic_correction(weight: Tensor, approximate: Tensor, input_mean: Tensor, groups: int = 1) -> Tensor:
    """What to add to the bias when the mean of every input channel is known, [out] float32.

    Args:
        weight: [out, in / groups * kernel] float.
        approximate: what stands for it, of that shape.
        input_mean: [in] E[x] per input channel.
        groups: groups of a convolution.
    """
    spread = spread_channels(input_mean.double(), (weight.shape[0], weight.shape[1]), groups)
    return ((weight.double() - approximate.double()) * spread).sum(1).float()
