"""High-bias absorption: what a channel never falls below moves from its bias into the next layer's.

A channel that stays above c > 0 passes a ReLU unchanged, and so does the channel minus c:
relu(z) = relu(z - c) + c. The constant goes on through the weights,

    b1 - c,    b2 + W2 c,

and the range of the activation between the layers is narrower by c. Equalization makes such channels: it multiplies
biases too.

Source:
    Nagel et al. 2019, arXiv:1906.04721, section 4.1.3 (bias absorption). Differs: c = mean - 3 sigma from BatchNorm's
    statistics holds for all but 0.1 % of a Gaussian's values; here it is the smaller of that, on calibration data, and
    of the smallest value that was seen, so the function is unchanged on all of that data. Consumers that pad their
    input with zeros are left alone, since a constant does not continue into the padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.core import spread_channels
from narrowcast.transforms.pairs import Pair, checked_pairs

_SIGMAS = 3.0


@dataclass(frozen=True)
class Absorb:
    """High-bias absorption.

    Args:
        pairs: (producer, consumer) glob patterns; empty takes every pair that keeps the function.
    """

    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", checked_pairs("absorb", self.pairs))


def absorbable(low: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The constant that can be taken off every channel, [channels] >= 0.

    Args:
        low: [channels] smallest value seen before the ReLU.
        mean: [channels] mean of the values.
        deviation: [channels] their standard deviation.
    """
    return torch.minimum(low, mean - _SIGMAS * deviation).clamp(min=0)


def absorbed_bias(weight: Tensor, bias: Tensor | None, amount: Tensor, groups: int = 1) -> Tensor:
    """The consumer's bias that makes up for input channels that are lower by `amount`.

    Args:
        weight: [out, in / groups * kernel] float.
        bias: [out] float or None for zero.
        amount: [in] what every input channel lost.
        groups: groups of a convolution.

    Returns:
        [out] in the dtype of `weight`.
    """
    spread = spread_channels(amount.double(), (weight.shape[0], weight.shape[1]), groups)
    added = (weight.double() * spread).sum(1)
    return (added if bias is None else added + bias.double()).to(weight.dtype)
