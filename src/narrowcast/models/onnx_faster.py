"""The same function in operators for which ONNX Runtime's CPU kernels are faster; each rewrite is told in a note.

Measured on ONNX Runtime 1.31.1: docs/onnx.md.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from narrowcast.models.onnx_layers import attribute
from narrowcast.models.onnx_scribe import Scribe, replace_node

_IMAGE_AXES = {2, 3}


def pool_averages(scribe: Scribe) -> list[str]:
    """Write means over the pixels of an image as GlobalAveragePool, which has a kernel in codes; returns notes."""
    nodes = [node for node in scribe.model.graph.all_nodes() if _averages_images(node)]
    for node in nodes:
        pooled = scribe.before(node, "GlobalAveragePool", [node.inputs[0]], f"{node.name}_GlobalAveragePool")
        shape = node.inputs[0].shape
        pooled.shape, pooled.type = ir.Shape([shape[0], shape[1], 1, 1]), node.outputs[0].type
        if not attribute(node, "keepdims", 1):
            pooled = scribe.before(node, "Flatten", [pooled], f"{node.name}_Flatten", attributes={"axis": 1})
        replace_node(node, pooled)
    return [f"{len(nodes)} means over images are GlobalAveragePool, which has a kernel in codes"] if nodes else []


def _averages_images(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or node.domain not in ("", "ai.onnx") or node.inputs[0] is None:
        return False
    shape = node.inputs[0].shape
    if shape is None or len(shape) != 4 or node.inputs[0].dtype not in (ir.DataType.FLOAT, None):
        return False
    axes: Any = attribute(node, "axes", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = None if node.inputs[1].const_value is None else node.inputs[1].const_value.numpy()
    return axes is not None and {int(axis) % 4 for axis in axes} == _IMAGE_AXES


def add_before_norms(model: ir.Model) -> list[str]:
    """Write the residual Adds in front of a LayerNormalization as Sum, in place; returns notes.

    ONNX Runtime makes SkipLayerNormalization of the two, whose CPU kernel takes 228 us where Sum and LayerNormalization
    take 34 (128 x 384, one thread, in a profile of MiniLM). A Sum of two is the same number, and is left alone.
    """
    changed = 0
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Add" and node.domain in ("", "ai.onnx") and _is_residual(node) and _is_normed(node):
            node.op_type = "Sum"
            changed += 1
    if not changed:
        return []
    return [
        f"{changed} Adds in front of a LayerNormalization are written as Sum: ONNX Runtime would make "
        "SkipLayerNormalization of them, which is slower on the CPU"
    ]


def _is_residual(node: ir.Node) -> bool:
    """Whether neither value is a constant, or comes out of codes, where the Add may have a kernel of its own."""
    values = [value for value in node.inputs if value is not None]
    makers = [value.producer() for value in values]
    coded = any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
    return not coded and all(value.const_value is None for value in values)


def _is_normed(node: ir.Node) -> bool:
    """Whether a LayerNormalization, or one in single nodes (x - mean(x)), reads the sum."""
    readers = {(reader.op_type, index) for reader, index in node.outputs[0].uses()}
    return ("LayerNormalization", 0) in readers or {("ReduceMean", 0), ("Sub", 0)} <= readers
