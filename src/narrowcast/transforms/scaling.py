"""Moving a scale per channel from one layer into the next: what every rescaling transform is made of.

A producer's output channel c is divided by s_c > 0, and every consumer multiplies the columns that read it by s_c. What
lies between must let a positive factor through. Which column reads which channel is `columns` [in]: the channel's
index, or -1 where a column reads something else (so a fused, repeated or concatenated input is one case, not four).
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.core import spread_channels

# A scale beyond this says that the channel is dead on one side, not that it should be moved so far: a bias on it would
# be blown up with it.
LARGEST_SCALE = 256.0


def divide_rows(weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """A producer's weight and bias with output channel c divided by scale[c].

    Args:
        weight: [out, columns] float.
        bias: [out] float or None.
        scale: [out] float > 0.
    """
    scale = scale.double()
    rows = (weight.double() / scale.unsqueeze(1)).to(weight.dtype)
    return rows, None if bias is None else (bias.double() / scale).to(bias.dtype)


def multiply_columns(weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """A consumer's weight with input channel j multiplied by scale[j].

    Args:
        weight: [out, in / groups * kernel] float.
        scale: [in] float > 0.
        groups: groups of a convolution.
    """
    factor = spread_channels(scale.double(), (weight.shape[0], weight.shape[1]), groups)
    return (weight.double() * factor).to(weight.dtype)


def at_columns(scale: Tensor, columns: Tensor) -> Tensor:
    """The factor of every input channel of a consumer: 1 where it reads another producer.

    Args:
        scale: [channels] of the producer.
        columns: [in] producer channel that each input channel reads, or -1.
    """
    return torch.where(columns >= 0, scale[columns.clamp(min=0)], torch.ones((), dtype=scale.dtype))


def to_channels(values: Tensor, columns: Tensor, channels: int) -> Tensor:
    """The largest value over all columns that read a channel; 0 where none does.

    Args:
        values: [in] float >= 0, one per input channel of a consumer.
        columns: [in] producer channel that each reads, or -1.
        channels: output channels of the producer.
    """
    used = columns >= 0
    largest = torch.zeros(channels, dtype=values.dtype)
    return largest.scatter_reduce(0, columns[used], values[used], "amax")


def column_maximum(weight: Tensor, groups: int = 1, kernel: int = 1) -> Tensor:
    """Largest absolute weight on every input channel, [in].

    Args:
        weight: [out, in / groups * kernel] float.
        groups: groups of a convolution.
        kernel: columns per input channel.
    """
    largest = weight.abs().view(groups, weight.shape[0] // groups, -1, kernel).amax(dim=(1, 3))
    return largest.reshape(-1)


def limited(scale: Tensor, usable: Tensor) -> Tensor:
    """A scale that is 1 where a channel cannot be used, and nowhere beyond `LARGEST_SCALE`.

    Args:
        scale: [channels] float; anything where not usable.
        usable: [channels] bool.
    """
    scale = torch.where(usable & torch.isfinite(scale), scale, torch.ones((), dtype=scale.dtype))
    return scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
