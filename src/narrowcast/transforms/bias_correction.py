"""Bias correction: take the mean error that quantization leaves in every output channel out through the bias.

Source:
    Nagel et al. 2019, arXiv:1906.04721, section 4.2 (empirical variant). Differs: each layer is corrected on its own
    float inputs, and the measured mean is shrunk by its uncertainty (James & Stein 1961), so a small sample cannot put
    its own noise into the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
