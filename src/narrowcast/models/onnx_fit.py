"""Whether the attributes and constants of one node fit together, as folding takes them to.

onnx's own checker knows which attributes an operator has, not how many numbers belong into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from narrowcast.errors import ModelError
from narrowcast.models.onnx_layers import attribute

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_NORM_INPUTS = ("scale", "B", "mean", "var")


def check_fit(model: ir.Model) -> None:
    """Hold convolutions, Gemms, paddings and BatchNorms with constants against themselves.

    Raises:
        ModelError: a list has another number of numbers than the weight has axes for, or constants of one node have
            sizes that contradict each other.
    """
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("Conv", "ConvTranspose"):
            _check_convolution(node)
        elif node.op_type == "BatchNormalization":
            _check_norm(node)
        elif node.op_type == "Gemm":
            _check_gemm(node)
        elif node.op_type == "Pad":
            _check_pads(node)


def floats(*values: Any) -> bool:
    """Whether all of these are constants of floats that torch knows as numpy does."""
    return all(v is not None and v.const_value is not None and v.const_value.dtype in _FLOATS for v in values)


def spatial_axes(node: ir.Node) -> int | None:
    """Axes along which a convolution slides; None where the shape of its weight is not known."""
    shape = _shape(node, 1)
    return None if shape is None else len(shape) - 2


def _shape(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """The shape of a constant input; None for an absent one, and for one that is computed."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or value.const_value is None:
        return None
    return tuple(int(side) for side in value.const_value.shape)


def _refuse(node: ir.Node, what: str, got: Any, expected: str) -> None:
    raise ModelError(
        f"node {node.name!r} ({node.op_type}): {what} {got}, and {expected}; the file is damaged: export it again"
    )


def _check_convolution(node: ir.Node) -> None:
    weight, bias = _shape(node, 1), _shape(node, 2)
    if weight is None:
        return
    if len(weight) < 3:
        _refuse(node, "the weight has the shape", list(weight), "a convolution's has 3 axes at least")
    axes, groups = len(weight) - 2, int(attribute(node, "group", 1))
    for name, wanted in (("kernel_shape", axes), ("strides", axes), ("dilations", axes), ("pads", 2 * axes)):
        given = attribute(node, name, None)
        if given is not None and len(given) != wanted:
            _refuse(node, f"{name} is", list(given), f"a weight of shape {list(weight)} wants {wanted} numbers there")
    if groups < 1 or weight[0] % groups:
        _refuse(node, "group is", groups, f"that does not divide the first side of the weight {list(weight)}")
    channels = weight[0] if node.op_type == "Conv" else weight[1] * groups
    if bias is not None and bias != (channels,):
        _refuse(node, "the bias has the shape", list(bias), f"the weight {list(weight)} wants [{channels}]")


def _check_gemm(node: ir.Node) -> None:
    for index, name in enumerate("AB"):
        shape = _shape(node, index)
        if shape is not None and len(shape) != 2:
            _refuse(node, f"{name} has the shape", list(shape), "it is a matrix")


def _check_norm(node: ir.Node) -> None:
    shapes = {name: _shape(node, index) for index, name in enumerate(_NORM_INPUTS, 1)}
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    if any(len(shape) != 1 for shape in known.values()) or len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in known.items())
        _refuse(node, "the constants have the shapes", listed, "all of them have one number for each channel")


def check_channels(layer: ir.Node, norm: ir.Node, channels: int) -> None:
    """A BatchNorm has as many channels as the layer before it gives.

    Raises:
        ModelError: it has not; both nodes are named.
    """
    shape = _shape(norm, 1)
    if shape is not None and shape != (channels,):
        _refuse(norm, "it has constants of shape", list(shape),
                f"{layer.op_type} {layer.name!r} before it gives {channels} channels")  # fmt: skip


def _check_pads(node: ir.Node) -> None:
    shape = _shape(node, 1)
    if shape is None:
        return
    kind = node.inputs[1].const_value.dtype
    if len(shape) != 1 or shape[0] % 2 or kind != ir.DataType.INT64:
        _refuse(node, "pads are", f"{kind.name} of shape {list(shape)}", "they are int64, two for each axis")
    fill = _shape(node, 2)
    if fill is not None and fill not in ((), (1,)):
        _refuse(node, "the value to fill with has the shape", list(fill), "it is one number")


def fits_pads(pads: Sequence[int], readers: Sequence[ir.Node]) -> bool:
    """Whether pads of a whole image are those of the images that these convolutions read."""
    return all(spatial_axes(reader) == len(pads) // 2 - 2 for reader in readers)
