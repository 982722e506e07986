"""Which input channel every column of a weight matrix multiplies."""

from __future__ import annotations

from torch import Tensor


def spread_channels(values: Tensor, shape: tuple[int, int], groups: int = 1) -> Tensor:
    """One value per input channel, at every element of the weight matrix that multiplies that channel.

    Args:
        values: [channels] one per input channel.
        shape: (out, in / groups * kernel) of the weight matrix; the kernel's elements of a channel stand together.
        groups: groups of a convolution: row o sees the channels of group o * groups // out only.

    Returns:
        [1, columns] for one group, else [rows, columns].
    """
    rows, columns = shape
    per_group = values.numel() // groups
    spread = values.view(groups, per_group).repeat_interleave(columns // per_group, 1)
    return spread if groups == 1 else spread.repeat_interleave(rows // groups, 0)
