"""The input vectors that a weight matrix multiplies: tokens of a linear layer, patches of a convolution (im2col)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.nn import ConvShape

_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
# Patches of one image overlap, and neighbours tell the same: about so many are taken of every image.
PATCHES_PER_IMAGE = 256


def input_rows(module: nn.Module, x: Tensor, most_per_image: int | None = PATCHES_PER_IMAGE) -> Tensor:
    """The vectors that the rows of a module's weight matrix are multiplied with.

    Args:
        module: a linear layer, a convolution, or any other that multiplies the last dimension of its input.
        x: its input.
        most_per_image: patches taken of every image, evenly spread; None takes all.

    Returns:
        [groups, vectors, columns]; one group but for grouped convolutions, whose output channels see one group each.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
        return x.reshape(1, -1, x.shape[-1])
    shape = ConvShape.of(module)
    if shape.dimensions == 1:
        x = x.unsqueeze(-2)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    stride, padding, upsample = shape.as_direct()
    x = _padded(_spread(x, upsample), padding, shape)
    columns = functional.unfold(x, shape.kernel, dilation=shape.dilation, stride=stride)
    batch, _, positions = columns.shape
    if most_per_image is not None:
        step = max(1, -(-positions // most_per_image))
        columns = columns[:, :, step // 2 :: step]
    columns = columns.reshape(batch, shape.groups, -1, columns.shape[-1])
    return columns.permute(1, 0, 3, 2).reshape(shape.groups, -1, columns.shape[2])


def _spread(x: Tensor, upsample: tuple[int, int]) -> Tensor:
    """Zeros between neighbours, as a transposed convolution sees its input."""
    if upsample == (1, 1):
        return x
    batch, channels, height, width = x.shape
    wide = x.new_zeros(batch, channels, (height - 1) * upsample[0] + 1, (width - 1) * upsample[1] + 1)
    wide[:, :, :: upsample[0], :: upsample[1]] = x
    return wide


def _padded(x: Tensor, padding: tuple[int, int, int, int], shape: ConvShape) -> Tensor:
    top, left, bottom, right = padding
    sides = (left, right + shape.output_padding[1], top, bottom + shape.output_padding[0])
    return functional.pad(x, sides, mode=_PADDING_MODES[shape.padding_mode]) if any(sides) else x


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most `most` rows of [n, ...], evenly spread."""
    if rows.shape[0] <= most:
        return rows
    chosen = torch.arange(most, dtype=torch.float64) * (rows.shape[0] / most)
    return rows[chosen.to(torch.int64)]
