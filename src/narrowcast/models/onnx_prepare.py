"""Rewrites of a float ONNX graph before anything is quantized; each keeps the function and is told in a note."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from narrowcast.models.onnx_faster import pool_averages
from narrowcast.models.onnx_fit import check_channels, check_fit, fits_pads, floats
from narrowcast.models.onnx_layers import attribute
from narrowcast.models.onnx_recurrent import fold_weights
from narrowcast.models.onnx_scribe import Scribe
from narrowcast.transforms import BatchNormStatistics, fold_batchnorm

# The IR version since which a constant need not be an input, and the one that goes with opset 13.
_FREE_CONSTANTS_IR, _PER_AXIS_IR = 4, 7


def prepare(model: ir.Model, *, fold_batchnorm: bool) -> list[str]:
    """Bring a model into the form that quantizing expects, in place; returns notes.

    Constant nodes become initializers, functions are inlined, nodes without a name get one. Zero
    padding becomes part of the convolution behind it, and BatchNorm of the one before it; means over images
    become pools.

    Raises:
        ModelError: attributes and constants of a node contradict each other.
    """
    notes = []
    if model.functions:
        common.InlinePass()(model)
        notes.append("functions of the model were inlined")
    common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model)
    fold_shapes(model)
    _name_nodes(model)
    check_fit(model)
    infer_shapes(model)
    scribe = Scribe(model)
    if arranged := fold_weights(scribe):
        notes.append(f"weights of {arranged} recurrent nodes were arranged once: the graph did so at every run")
    padded = sum(_fold_pad(scribe, node) for node in list(model.graph.all_nodes()) if node.op_type == "Pad")
    if padded:
        notes.append(f"{padded} paddings with zeros were folded into the convolutions behind them")
    norms = [node for node in model.graph.all_nodes() if node.op_type == "BatchNormalization" and fold_batchnorm]
    folded = sum(_fold_norm(scribe, node) for node in norms)
    if folded:
        notes.append(f"{folded} BatchNorms were folded into the layers before them")
    if len(norms) > folded:
        notes.append(f"{len(norms) - folded} BatchNorms stay: they follow no layer of floats that is theirs alone")
    notes += pool_averages(scribe)
    common.RemoveUnusedNodesPass()(model)
    return notes


def fold_shapes(model: ir.Model) -> None:
    """Shapes that are asked of constants become constants, in place: else a float weight stays for its shape alone."""
    scribe = Scribe(model)
    for node in list(model.graph.all_nodes()):
        value = node.outputs[0]
        asked = node.inputs[0] if node.op_type == "Shape" else None
        if asked is None or asked.const_value is None or value.is_graph_output():
            continue
        sides = list(asked.const_value.shape)[attribute(node, "start", 0) : attribute(node, "end", None)]
        value.replace_all_uses_with(scribe.constant(np.array(sides, np.int64), f"{value.name}_constant"))
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def constants_only(model: ir.Model) -> list[str]:
    """Take constants out of the graph's inputs, in place, where the file is of a time when all had to be there.

    Where only some are, that is on purpose: a caller may pass others.
    """
    initializers, inputs = model.graph.initializers, model.graph.inputs
    both = [value for value in inputs if value.name in initializers]
    if not both or (len(both) < len(initializers) and model.ir_version >= _FREE_CONSTANTS_IR):
        return []
    for value in both:
        inputs.remove(value)
    model.ir_version = max(model.ir_version, _PER_AXIS_IR)
    return [
        f"{len(both)} constants were inputs of the graph as well, as old files have it; they are constants only now"
    ]


def _name_nodes(model: ir.Model) -> None:
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        stem = node.name or f"{node.op_type}_of_{node.outputs[0].name}"
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        node.name = name


def infer_shapes(model: ir.Model) -> None:
    """Ranks of the values, where onnx can tell; what it cannot tell stays unknown, and nothing depends on it."""
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def _array(value: Any) -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _fold_pad(scribe: Scribe, node: ir.Node) -> bool:
    """Let convolutions pad by themselves; returns whether it was done."""
    pads = _array(node.inputs[1]) if len(node.inputs) > 1 else None
    given = node.inputs[2] if len(node.inputs) > 2 else None
    fill = np.float32(0) if given is None else _array(given) if floats(given) else None
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    value = node.outputs[0]
    readers = [reader for reader, index in value.uses() if index == 0]
    simple = attribute(node, "mode", "constant") == "constant" and axes is None and fill is not None
    if pads is None or not simple or float(np.asarray(fill).reshape(-1)[0]) != 0.0 or value.is_graph_output():
        return False
    rank = len(pads) // 2
    if len(readers) != len(list(value.uses())) or not readers or any(pads[:2]) or any(pads[rank : rank + 2]):
        return False
    if any(r.op_type != "Conv" or attribute(r, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") for r in readers):
        return False
    if not len(pads) or min(pads) < 0 or not fits_pads(pads, readers):
        return False
    spatial = [int(side) for side in [*pads[2:rank], *pads[rank + 2 :]]]
    for reader in readers:
        had = attribute(reader, "pads", [0] * len(spatial))
        reader.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(had, spatial, strict=True)])
        reader.attributes.pop("auto_pad", None)
        reader.replace_input_with(0, node.inputs[0])
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


def _fold_norm(scribe: Scribe, node: ir.Node) -> bool:
    """BatchNorm of what a layer gives as one layer with other constants; returns whether it was done."""
    layer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if layer is None or not _takes_norm(layer) or len(node.outputs) > 1 or attribute(node, "training_mode", 0):
        return False
    has_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
    if not floats(*layer.inputs[1 : 2 + has_bias], *node.inputs[1:5]):
        return False
    parts = [_array(value) for value in node.inputs[1:5]]
    weight, axis = _array(layer.inputs[1]), _output_axis(layer)
    bias = _array(layer.inputs[2]) if has_bias else None
    channels = weight.shape[axis]
    check_channels(layer, node, channels)
    if bias is not None and bias.size != 1 and (bias.size != channels or bias.shape[-1] != channels):
        return False  # what Gemm adds differs from row to row
    gamma, beta, mean, variance = (torch.from_numpy(np.array(part)) for part in parts)
    statistics = BatchNormStatistics(mean, variance, gamma, beta, attribute(node, "epsilon", 1e-5))
    rows = torch.from_numpy(np.moveaxis(weight, axis, 0).copy())
    added = None if bias is None else torch.from_numpy(np.array(np.broadcast_to(bias.reshape(-1), rows.shape[0])))
    folded, shifted = fold_batchnorm(rows, added, statistics)
    stem = str(layer.inputs[1].name)
    array = np.ascontiguousarray(np.moveaxis(folded.numpy(), 0, axis))
    layer.replace_input_with(1, _renamed(scribe, layer.inputs[1], array, stem))
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, scribe.constant(shifted.numpy(), f"{stem.removesuffix('.weight')}.folded_bias"))
    _take_out(node, layer.outputs[0])
    return True


def _takes_norm(layer: ir.Node) -> bool:
    """Whether a BatchNorm behind this layer can be part of it: nothing else reads what it gives."""
    value = layer.outputs[0]
    if layer.domain != "" or len(list(value.uses())) != 1 or value.is_graph_output():
        return False
    if layer.op_type == "Gemm":
        return attribute(layer, "alpha", 1.0) == 1.0 and attribute(layer, "beta", 1.0) == 1.0
    return layer.op_type == "Conv" or (layer.op_type == "ConvTranspose" and attribute(layer, "group", 1) == 1)


def _output_axis(layer: ir.Node) -> int:
    """The axis of a weight along which output channels lie."""
    if layer.op_type == "Gemm":
        return 0 if attribute(layer, "transB", 0) else 1
    return 0 if layer.op_type == "Conv" else 1


def _take_out(node: ir.Node, value: ir.Value) -> None:
    """Let what reads a node's output read `value`, under the same name, and remove the node."""
    old, name = node.outputs[0], node.outputs[0].name
    assert node.graph is not None
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    value.name = name


def _renamed(scribe: Scribe, value: ir.Value, array: Any, stem: str) -> ir.Value:
    """A constant with other numbers, under the same name where nothing else reads the old ones."""
    if len(list(value.uses())) == 1 and not value.is_graph_input():
        value.const_value = ir.tensor(array, name=stem)
        return value
    return scribe.constant(array, f"{stem}_folded")
