"""LSTM and GRU nodes: weights that exporters compute from constants, and the integer LSTM of ONNX Runtime.

ONNX has the weights of a node as W [directions, gates * hidden, inputs] and R [directions, gates * hidden, hidden],
gates in the order i, o, f, c (GRU: z, r, h), directions forward and reverse. Their rows are quantized as those of
the matrix [directions * gates * hidden, columns]; the order of the gates does not matter for that.

Source:
    onnx/docs/Operators.md, LSTM; onnxruntime/docs/ContribOperators.md, com.microsoft.DynamicQuantizeLSTM: the same
    inputs and attributes with W and R transposed, [directions, columns, gates * hidden], and after them scales and zero
    points, here per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from narrowcast.core import QuantizedTensor
from narrowcast.models.onnx_layers import RECURRENT, Use
from narrowcast.models.onnx_patterns import codes_of, stored
from narrowcast.models.onnx_scribe import MICROSOFT, Scribe, opset_of

Array = Any
# Exporters turn the order of gates around and add an axis for the direction with these.
_ARRANGING = (
    "Concat", "Constant", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
_WEIGHTS, _INPUTS = (1, 2), 8
_ROLES = {1: "weight_ih", 2: "weight_hh", 3: "bias"}


def fold_weights(scribe: Scribe) -> int:
    """Compute weights and biases of recurrent nodes that are made of constants, in place.

    Returns:
        How many nodes have other inputs now.
    """
    changed = 0
    for node in [node for node in scribe.model.graph.all_nodes() if node.op_type in RECURRENT and node.domain == ""]:
        found = {index: _folded(scribe, node.inputs[index]) for index in _ROLES if index < len(node.inputs)}
        found = {index: array for index, array in found.items() if array is not None}
        for index, array in found.items():
            node.replace_input_with(index, scribe.constant(array, f"{node.name}.{_ROLES[index]}"))
        changed += bool(found)
    return changed


def _folded(scribe: Scribe, value: Any) -> Array | None:
    """What a value is, if nodes that only arrange constants make it; None for a constant itself and for all others."""
    if value is None or value.producer() is None:
        return None
    return _evaluated(value, opset_of(scribe.model))


def _evaluated(value: ir.Value, opset: int) -> Array | None:
    node = value.producer()
    if node is None:
        constant = value.const_value is not None and value.is_initializer() and not value.is_graph_input()
        return value.const_value.numpy() if constant and value.const_value is not None else None
    if node.op_type not in _ARRANGING or node.domain != "" or node.graph is None:
        return None
    given = {str(source.name): _evaluated(source, opset) for source in node.inputs if source is not None}
    if any(array is None for array in given.values()):
        return None
    proto = ir.to_proto(node)
    graph = onnx.helper.make_graph(
        [proto], "one", [onnx.ValueInfoProto(name=name) for name in given], [onnx.ValueInfoProto(name=str(value.name))]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return np.asarray(ReferenceEvaluator(model).run(None, given)[0])


@dataclass
class Halves:
    """LSTM nodes of which one of the two weights was solved: both are written at once.

    Args:
        waiting: by the node's id, what is known of its weights, by their index among the inputs.
    """

    waiting: dict[int, dict[int, tuple[Use, QuantizedTensor]]] = field(default_factory=dict)

    def add(self, scribe: Scribe, use: Use, record: QuantizedTensor) -> dict[str, str]:
        """Take in one weight, int8 per row, symmetric; returns names of codes by path once both are there."""
        both = self.waiting.setdefault(id(use.node), {})
        both[use.index] = (use, record)
        if len(both) < len(_WEIGHTS):
            return {}
        del self.waiting[id(use.node)]
        return _integer_lstm(scribe, both)

    def alone(self, scribe: Scribe) -> Iterator[tuple[str, str]]:
        """Write the weights whose other half stayed float; the node does too, and dequantizes them at every run."""
        for both in self.waiting.values():
            for use, record in both.values():
                yield use.path, stored(scribe, use, record)
        self.waiting = {}


def _integer_lstm(scribe: Scribe, both: dict[int, tuple[Use, QuantizedTensor]]) -> dict[str, str]:
    node = both[1][0].node
    inputs = [*node.inputs, *[None] * (_INPUTS - len(node.inputs))]
    codes: dict[str, str] = {}
    parts: list[ir.Value] = []
    for index in _WEIGHTS:
        use, record = both[index]
        stem = str(use.weight.name)
        directions, rows, columns = (int(side) for side in use.weight.const_value.shape)
        matrix, scale, _ = codes_of(record)
        layout = matrix.reshape(directions, rows, columns).transpose(0, 2, 1).astype(np.int8)
        scales = np.broadcast_to(scale[:, :1], (directions * rows, 1)).reshape(directions, rows)
        inputs[index] = scribe.constant(layout, f"{stem}_quantized")
        codes[use.path] = str(inputs[index].name)
        parts += [
            scribe.constant(scales, f"{stem}_scale"),
            scribe.constant(np.zeros(scales.shape, np.int8), f"{stem}_zero_point"),
        ]
    attributes = {name: found.value for name, found in node.attributes.items() if name != "layout"}
    made = scribe.before(
        node, "DynamicQuantizeLSTM", [*inputs, *parts], f"{node.name}_quantized", domain=MICROSOFT,
        outputs=max(2, len(node.outputs)), attributes=attributes,
    )  # fmt: skip
    _replace_all(node, made)
    return codes


def _replace_all(node: ir.Node, values: Any) -> None:
    """Let everything that reads the outputs of a node read `values`, under the same names, and remove the node."""
    graph, pairs = node.graph, list(zip(node.outputs, values, strict=False))
    assert graph is not None
    names = [old.name for old in node.outputs]
    for old, new in pairs:
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for (_, new), name in zip(pairs, names, strict=True):
        if name:
            new.name = name
