"""Adds constants and nodes to an ONNX graph, under names that are free, where they are computed in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.version_converter import convert_version

from narrowcast.errors import ModelError
from narrowcast.models.onnx_large import SMALLEST_SPOOLED, Spool, without_weights

MICROSOFT = "com.microsoft"
# The least opset with per-axis QuantizeLinear and DequantizeLinear, and with blocks and 4 bits.
PER_AXIS_OPSET, BLOCKED_OPSET = 13, 21
# The IR version that can name 4-bit types.
BLOCKED_IR = 10


class Scribe:
    """Writes into one model.

    Args:
        model: changed.
        spool: where large constants go; None keeps them in memory.
    """

    def __init__(self, model: ir.Model, spool: Spool | None = None) -> None:
        self.model, self.spool = model, spool
        self._names: set[str] = set()
        for graph in model.graphs():
            self._names |= {str(value.name) for value in [*graph.inputs, *graph.initializers.values()]}
            for node in graph:
                self._names |= {str(node.name), *(str(value.name) for value in node.outputs)}

    def free(self, name: str) -> str:
        """`name`, or with a number where it is taken; taken from now on."""
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}_{count}"
        self._names.add(found)
        return found

    def constant(self, array: Any, name: str) -> ir.Value:
        """An initializer of the main graph, which subgraphs see too."""
        name = self.free(name)
        tensor: Any = ir.tensor(np.array(array, order="C"), name=name)
        if self.spool is not None and tensor.nbytes >= SMALLEST_SPOOLED:
            tensor = self.spool.put(tensor)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def before(
        self, node: ir.Node, op: str, inputs: Sequence[Any], name: str, *, domain: str = "", outputs: int = 1,
        attributes: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """A new node right before another one; returns its output, or its outputs where there are several."""
        made = self._node(op, inputs, name, domain, outputs, attributes or {})
        assert node.graph is not None
        node.graph.insert_before(node, made)
        return made.outputs[0] if outputs == 1 else made.outputs

    def after(
        self, value: ir.Value, graph: ir.Graph, op: str, inputs: Sequence[Any], name: str,
        *, attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:  # fmt: skip
        """A new node right after the one that gives a value, or at the front of the graph for an input of it."""
        made = self._node(op, inputs, name, "", 1, attributes or {})
        producer = value.producer()
        if producer is None:
            graph.insert_before(next(iter(graph)), made)
        else:
            graph.insert_after(producer, made)
        return made.outputs[0]

    def _node(
        self, op: str, inputs: Sequence[Any], name: str, domain: str, outputs: int, attributes: Mapping[str, Any]
    ) -> ir.Node:
        name = self.free(name)
        values = [ir.Value(name=self.free(f"{name}_out{i}" if outputs > 1 else f"{name}_out")) for i in range(outputs)]
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        return ir.Node(
            domain, op, inputs, ir.convenience.convert_attributes(dict(attributes)), name=name, outputs=values
        )


def replace_node(node: ir.Node, value: ir.Value) -> None:
    """Let everything that reads a node's output read `value`, under the name of that output, and remove the node."""
    old = node.outputs[0]
    graph = node.graph
    assert graph is not None
    name = old.name
    value.shape, value.type = old.shape, old.type
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators that a model uses."""
    return int(model.opset_imports.get("", 1))


def with_opset(model: ir.Model, least: int) -> tuple[ir.Model, str]:
    """The model in an opset of at least `least`, and what to say of it.

    Raises:
        ModelError: the converter cannot do it.
    """
    had = opset_of(model)
    if had >= least:
        return model, ""
    try:
        converted = without_weights(model, lambda proto: convert_version(proto, least))
    except Exception as error:  # onnx raises errors of many classes without a common base; its words are kept
        raise ModelError(
            f"the model is of opset {had}, {least} is needed, and onnx's converter cannot make it so: {error!s:.300}; "
            "export the model again with a newer opset"
        ) from None
    return converted, f"opset {had} was converted to {least} by onnx, as the formats of the recipe need"
