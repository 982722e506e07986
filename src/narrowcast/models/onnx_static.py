"""Where static ranges are needed in an ONNX graph, and putting them there so that ONNX Runtime computes in integers.

What is needed beside the input of a product: the output of a convolution (behind its Relu or Clip), without which it
stays float, and both ends of the operators between two products that have 8-bit kernels. A sum of values that exist as
codes only is a sum of codes too, whatever reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from narrowcast.models.onnx_layers import attribute
from narrowcast.models.onnx_scribe import Scribe

# The codes of the output are codes of the input.
SAME_CODES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad")
# ONNX Runtime has kernels that read and write 8-bit codes in scales of their own.
IN_CODES = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
# A product's Q may stand behind these, if its zero point is the code of their lower end.
_RECTIFIERS = ("Relu", "Clip")
# So far a search goes through operators that could run in codes.
_DEPTH = 8


@dataclass
class Placement:
    """Values that get a static range.

    Args:
        values: by name; None stands for a range of its own, a name for the value whose range it shares.
        whole: names of the values that all readers read as codes; of the others only readers in codes do.
        in_codes: the nodes besides products that will compute in codes.
    """

    values: dict[str, str | None] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    in_codes: list[ir.Node] = field(default_factory=list)

    def observed(self) -> list[str]:
        """Names of the values whose ranges must be known."""
        return [name for name, like in self.values.items() if like is None]

    def source(self, name: str) -> str:
        """The value whose range a value has."""
        like = self.values[name]
        return name if like is None else self.source(like)


def place(nodes: Iterable[ir.Node]) -> Placement:
    """The values that need ranges so that these Conv, Gemm and MatMul nodes become integer kernels."""
    found = Placement()
    nodes = list(nodes)
    for node in nodes:
        found.values.setdefault(node.inputs[0].name, None)
        if node.op_type == "Conv":
            behind = rectified(node.outputs[0])
            found.values.setdefault(behind.name, None)
            found.whole.add(behind.name)
    by_name = {value.name: value for node in nodes for value in _around(node)}
    waiting = [by_name[name] for name in found.values]
    while waiting:
        waiting += _backward(waiting.pop(), found)
    for node in list(nodes[0].graph or ()) if nodes else ():
        _forward(node, found)
    return found


def _forward(node: ir.Node, found: Placement) -> None:
    """Let a sum compute in codes where both of its values exist as codes only: else both are dequantized for it."""
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or node in found.in_codes:
        return
    output = rectified(node.outputs[0])
    if output.is_graph_output() or not all(_only_codes(value, found) for value in _data_inputs(node)):
        return
    found.in_codes.append(node)
    found.values.setdefault(output.name, None)
    found.whole.add(output.name)


def _only_codes(value: ir.Value, found: Placement) -> bool:
    if value.name in found.whole:
        return True
    node = value.producer()
    if node is not None and node.op_type in _RECTIFIERS and value.name in found.values:
        node = node.inputs[0].producer()
    return node in found.in_codes and value.name in found.values


def rectified(value: ir.Value) -> ir.Value:
    """The value behind the Relu or Clip that alone reads `value`; the value itself where there is none."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output():
        return value
    node = readers[0][0]
    if node.domain == "" and node.op_type in _RECTIFIERS and readers[0][1] == 0 and _from_zero(node):
        return node.outputs[0]
    return value


def _from_zero(node: ir.Node) -> bool:
    """Whether the lower end of a Relu or Clip is 0, which is the smallest code of its output."""
    if node.op_type == "Relu":
        return True
    if len(node.inputs) < 2:
        return attribute(node, "min", None) == 0.0
    low = node.inputs[1]
    return low is not None and low.const_value is not None and float(low.const_value.numpy()) == 0.0


def _around(node: ir.Node) -> list[ir.Value]:
    return [node.inputs[0], node.outputs[0], rectified(node.outputs[0])]


def _backward(value: ir.Value, found: Placement) -> list[ir.Value]:
    """Add what must have a range so that the operator that gives `value` computes in codes; returns what is new."""
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return []
    if node.op_type in _RECTIFIERS and node.inputs[0].producer() is not None and _from_zero(node):
        if rectified(node.inputs[0]) is not value:
            return []
        node = node.inputs[0].producer()
    if node.op_type in SAME_CODES and node not in found.in_codes and _keeps_zero(node):
        source = node.inputs[0]
        found.in_codes.append(node)
        new = source.name not in found.values
        found.values.setdefault(source.name, None)
        if found.source(source.name) != value.name:  # no value shares its own range
            found.values[value.name] = source.name
        return [source] if new else []
    if node.op_type not in IN_CODES or node in found.in_codes or not _possible(value, found, _DEPTH):
        return []
    found.in_codes.append(node)
    new_values = [source for source in _data_inputs(node) if source.name not in found.values]
    for source in new_values:
        found.values[source.name] = None
    return new_values


def _keeps_zero(node: ir.Node) -> bool:
    """Whether a Pad fills with 0, which has a code; other nodes fill with nothing."""
    if node.op_type != "Pad":
        return True
    if len(node.inputs) < 2 or attribute(node, "mode", "constant") != "constant":
        return False
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    return fill is None or (fill.const_value is not None and not fill.const_value.numpy().any())


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _possible(value: ir.Value, found: Placement, depth: int) -> bool:
    """Whether the operator that gives `value` can compute in codes: all its inputs have ranges or can have."""
    node = value.producer()
    if node is None or depth == 0:
        return False
    if node.op_type in _RECTIFIERS:
        return _possible(node.inputs[0], found, depth - 1)
    if node.op_type not in IN_CODES + SAME_CODES or not _keeps_zero(node):
        return False
    inputs = _data_inputs(node) if node.op_type in IN_CODES else node.inputs[:1]
    return all(
        source.const_value is None and (source.name in found.values or _possible(source, found, depth - 1))
        for source in inputs
    )


def put(scribe: Scribe, graph: ir.Graph, placement: Placement, products: Iterable[ir.Node],
        ranges: Mapping[str, tuple[float, int]]) -> dict[str, str]:  # fmt: skip
    """Write the Q and DQ nodes.

    Args:
        scribe: writes.
        graph: the main graph.
        placement: where.
        products: the nodes whose first input is read as codes.
        ranges: scale and zero point of every value with a range of its own.

    Returns:
        By value, the name of its codes.
    """
    values = {value.name: value for node in graph for value in (*node.inputs, *node.outputs) if value is not None}
    in_codes = {id(node) for node in [*placement.in_codes, *products]}
    constants: dict[str, tuple[ir.Value, ir.Value]] = {}
    codes: dict[str, str] = {}
    for name in placement.values:
        source = placement.source(name)
        if source not in constants:
            scale, zero = ranges[source]
            constants[source] = (
                scribe.constant(np.float32(scale), f"{source}_scale"),
                scribe.constant(np.uint8(zero), f"{source}_zero_point"),
            )
        value = values[name]
        readers = [
            (node, index) for node, index in value.uses() if name in placement.whole or id(node) in in_codes
        ]  # fmt: skip
        codes[name] = _put_one(scribe, graph, value, constants[source], readers, whole=name in placement.whole)
    for node in placement.in_codes:
        if node.op_type == "Pad":
            _pad_codes(node)
    return codes


def _pad_codes(node: ir.Node) -> None:
    """Let a Pad between codes fill codes with that of 0; ONNX Runtime would pad floats and round again."""
    given, readers = node.inputs[0].producer(), list(node.outputs[0].uses())
    if given is None or given.op_type != "DequantizeLinear" or len(readers) != 1 or node.outputs[0].is_graph_output():
        return
    (reader, _), graph = readers[0], node.graph
    if reader.op_type != "QuantizeLinear" or graph is None:
        return
    node.resize_inputs(max(3, len(node.inputs)))
    node.replace_input_with(0, given.inputs[0])
    node.replace_input_with(2, given.inputs[2])
    node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    reader.outputs[0].replace_all_uses_with(node.outputs[0])
    graph.remove(reader, safe=True)


def _put_one(
    scribe: Scribe, graph: ir.Graph, value: ir.Value, range_: tuple[ir.Value, ir.Value], readers: list[Any],
    *, whole: bool,
) -> str:  # fmt: skip
    coded = scribe.after(value, graph, "QuantizeLinear", [value, *range_], f"{value.name}_QuantizeLinear")
    decoded = scribe.after(coded, graph, "DequantizeLinear", [coded, *range_], f"{value.name}_DequantizeLinear")
    decoded.shape, decoded.type = value.shape, value.type
    for node, index in readers:
        node.replace_input_with(index, decoded)
    if whole and value.is_graph_output():
        name = value.name
        value.name = scribe.free(f"{name}_before")
        for position, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[position] = decoded
        decoded.name = name
    return str(coded.name)
