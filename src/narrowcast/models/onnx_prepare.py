"""Rewrites of a float ONNX graph before anything is quantized; each keeps the function and is told in a note."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from narrowcast.models.onnx_layers import attribute
from narrowcast.models.onnx_recurrent import fold_weights
from narrowcast.models.onnx_scribe import Scribe

# Above this the graph is not sent through onnx's shape inference, which copies it.
_LARGEST_INFERENCE = 2**30


def prepare(model: ir.Model, *, fold_batchnorm: bool) -> list[str]:
    """Bring a model into the form that quantizing expects, in place; returns notes.

    Constant nodes become initializers, functions are inlined, nodes without a name get one. Zero
    padding becomes part of the convolution behind it, and BatchNorm of the one before it.
    """
    notes = []
    if model.functions:
        common.InlinePass()(model)
        notes.append("functions of the model were inlined")
    common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model)
    _name_nodes(model)
    _infer_shapes(model)
    scribe = Scribe(model)
    if arranged := fold_weights(scribe):
        notes.append(f"weights of {arranged} recurrent nodes were arranged once: the graph did so at every run")
    padded = sum(_fold_pad(scribe, node) for node in list(model.graph.all_nodes()) if node.op_type == "Pad")
    if padded:
        notes.append(f"{padded} paddings with zeros were folded into the convolutions behind them")
    norms = [node for node in model.graph.all_nodes() if node.op_type == "BatchNormalization" and fold_batchnorm]
    folded = sum(_fold_norm(scribe, node) for node in norms)
    if folded:
        notes.append(f"{folded} BatchNorms were folded into the convolutions before them")
    if len(norms) > folded:
        notes.append(f"{len(norms) - folded} BatchNorms stay: they follow no convolution that is theirs alone")
    common.RemoveUnusedNodesPass()(model)
    return notes


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


def _infer_shapes(model: ir.Model) -> None:
    """Ranks of the values, where onnx can tell; what it cannot tell stays unknown, and nothing depends on it."""
    size = sum(int(v.const_value.nbytes) for v in model.graph.initializers.values() if v.const_value is not None)
    if size < _LARGEST_INFERENCE:
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def _array(value: Any) -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _fold_pad(scribe: Scribe, node: ir.Node) -> bool:
    """Let convolutions pad by themselves; returns whether it was done."""
    pads = _array(node.inputs[1]) if len(node.inputs) > 1 else None
    fill = _array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.float32(0)
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
    if min(pads) < 0:
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
    """BatchNorm(Conv(x)) as one Conv with other constants; returns whether it was done."""
    conv = node.inputs[0].producer() if node.inputs[0] is not None else None
    if conv is None or conv.op_type != "Conv" or len(list(conv.outputs[0].uses())) != 1 or len(node.outputs) > 1:
        return False
    parts = [_array(value) for value in node.inputs[1:5]]
    weight = _array(conv.inputs[1])
    bias = _array(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.float32(0)
    if weight is None or bias is None or any(part is None for part in parts) or conv.outputs[0].is_graph_output():
        return False
    gamma, beta, mean, variance = (part.astype(np.float64) for part in parts)
    factor = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    stem = str(conv.inputs[1].name)
    new = (weight.astype(np.float64) * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
    shifted = ((bias - mean) * factor + beta).astype(np.float32)
    conv.replace_input_with(1, _renamed(scribe, conv.inputs[1], new, stem))
    if len(conv.inputs) < 3:
        conv.resize_inputs(3)
    conv.replace_input_with(2, scribe.constant(shifted, f"{stem.removesuffix('.weight')}.folded_bias"))
    old, value = node.outputs[0], conv.outputs[0]
    assert node.graph is not None
    name = old.name
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    value.name = name
    return True


def _renamed(scribe: Scribe, value: ir.Value, array: Any, stem: str) -> ir.Value:
    """A constant with other numbers, under the same name where nothing else reads the old ones."""
    if len(list(value.uses())) == 1 and not value.is_graph_input():
        value.const_value = ir.tensor(array, name=stem)
        return value
    return scribe.constant(array, f"{stem}_folded")
