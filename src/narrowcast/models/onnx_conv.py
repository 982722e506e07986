"""The numbers of a convolution of a graph: kernel, strides, dilations, pads, and the positions of its output."""

from __future__ import annotations

from typing import Any

from narrowcast.models.onnx_layers import Use, attribute


def conv_numbers(use: Use, sides: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """Kernel, stride, dilation, pads [begins..., ends...] of a convolution of images with these sides, in two axes."""
    kernel = [int(side) for side in use.weight.const_value.shape[2:]]
    spatial = len(kernel)
    stride = list(attribute(use.node, "strides", [1] * spatial))
    dilation = list(attribute(use.node, "dilations", [1] * spatial))
    pads = list(attribute(use.node, "pads", [0] * 2 * spatial))
    auto = attribute(use.node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        for axis, side in enumerate(sides[-spatial:]):
            reach = dilation[axis] * (kernel[axis] - 1) + 1
            total = max(0, (-(-side // stride[axis]) - 1) * stride[axis] + reach - side)
            small, large = total // 2, total - total // 2
            pads[axis], pads[axis + spatial] = (small, large) if auto == "SAME_UPPER" else (large, small)
    if spatial == 1:
        return [1, *kernel], [1, *stride], [1, *dilation], [0, pads[0], 0, pads[1]]
    return kernel, stride, dilation, pads


def conv_positions(use: Use, sides: tuple[int, ...]) -> int:
    """Output positions of a convolution of one image with these sides."""
    kernel, stride, dilation, pads = conv_numbers(use, sides)
    sides = (1, *sides) if len(sides) == 1 else sides
    half, total = len(pads) // 2, 1
    for axis, side in enumerate(sides):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        total *= max(0, (side + pads[axis] + pads[axis + half] - reach) // stride[axis] + 1)
    return total
