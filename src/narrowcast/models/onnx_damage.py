"""What the message of an ONNX file must be before anything believes it: text, versions, nodes, sizes of constants."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor

from narrowcast.errors import ModelError

_NO_VERSION = 2**31
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_SPARSE = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)
# Where a constant that is not stored as bytes has its numbers, by type; the other types have them in int32_data.
_FIELDS = {
    onnx.TensorProto.FLOAT: "float_data", onnx.TensorProto.COMPLEX64: "float_data",
    onnx.TensorProto.DOUBLE: "double_data", onnx.TensorProto.COMPLEX128: "double_data",
    onnx.TensorProto.INT64: "int64_data", onnx.TensorProto.UINT32: "uint64_data",
    onnx.TensorProto.UINT64: "uint64_data",
}  # fmt: skip


def check_message(proto: onnx.ModelProto, where: str) -> None:
    """Hold a model's message against what ONNX says of it, functions, subgraphs and constants in attributes too.

    Args:
        proto: the message; its external data is not looked at.
        where: the file, for errors.

    Raises:
        ModelError: it is damaged, no model, or has sparse constants.
    """
    _check_text(proto, where)
    if not proto.graph.node:
        raise ModelError(f"{where} is not an ONNX model: its graph has no node")
    _check_graph(proto.graph, set(), where, _context(proto.ir_version, proto.opset_import, where))
    for function in proto.functions:
        inside = f"{where}, function {function.name!r}"
        context = _context(proto.ir_version, function.opset_import, inside)
        known = _check_nodes(function.node, set(function.input), inside, context)
        _check_given(function.output, known, inside)


def _check_text(message: Any, where: str) -> None:
    """Every text is UTF-8: protobuf hands on the bytes of one that is not, and no later message can hold them."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            found = getattr(message, field.name)
            for text in [found] if isinstance(found, str | bytes) else found:
                if not isinstance(text, str):
                    raise ModelError(
                        f"{where}: {field.full_name} is {bytes(text)[:60]!r}, which is no UTF-8 text; the file is "
                        "damaged: get it again from where it came"
                    )
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            found = getattr(message, field.name)
            single = hasattr(found, "DESCRIPTOR")
            for inner in ([found] if message.HasField(field.name) else []) if single else found:
                _check_text(inner, where)


def _context(ir_version: int, opsets: Iterable[Any], where: str) -> Any:
    """Versions by which onnx checks nodes."""
    versions = {entry.domain: entry.version for entry in opsets}
    if not all(0 <= version < _NO_VERSION for version in (ir_version, *versions.values())):
        raise ModelError(f"{where}: IR version {ir_version} and opsets {versions} are no versions; it is damaged")
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = ir_version, versions
    return context


def _check_graph(graph: onnx.GraphProto, outer: set[str], where: str, context: Any) -> None:
    """Every value that a node reads is there before it: the graph has no cycle and no loose end."""
    if graph.sparse_initializer:
        _refuse_sparse(f"constant {graph.sparse_initializer[0].values.name!r}", where)
    known = outer | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        _check_tensor(tensor, where)
    _check_given([value.name for value in graph.output], _check_nodes(graph.node, known, where, context), where)


def _check_nodes(nodes: Iterable[onnx.NodeProto], known: set[str], where: str, context: Any) -> set[str]:
    """Nodes in their order; returns the names of all values there are after them."""
    known = set(known)
    for node in nodes:
        for name in node.input:
            if name and name not in known:
                raise ModelError(
                    f"{where}: node {node.name!r} ({node.op_type}) reads {name!r}, which nothing before it gives: the "
                    "graph has a cycle, or the file is damaged"
                )
        for attribute in node.attribute:
            _check_attribute(attribute, node, known, where, context)
        _check_node(node, where, context)
        known |= set(node.output)
    return known


def _check_given(outputs: Iterable[str], known: set[str], where: str) -> None:
    if loose := [name for name in outputs if name not in known]:
        raise ModelError(f"{where}: no node gives the output {loose[0]!r}; the file is damaged")


def _check_attribute(
    attribute: onnx.AttributeProto, node: onnx.NodeProto, known: set[str], where: str, context: Any
) -> None:
    if attribute.type in _SPARSE:
        _refuse_sparse(f"attribute {attribute.name!r} of node {node.name!r} ({node.op_type})", where)
    for inside in [attribute.g, *attribute.graphs] if attribute.type in _GRAPHS else ():
        _check_graph(inside, known, where, context)
    for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
        _check_tensor(tensor, f"{where}: node {node.name!r} ({node.op_type})")


def _refuse_sparse(what: str, where: str) -> None:
    raise ModelError(
        f"{where}: {what} is stored as a sparse tensor, which would be lost on the way; export the model again "
        "with dense constants"
    )


def _check_node(node: onnx.NodeProto, where: str, context: Any) -> None:
    """A standard operator has the inputs and attributes that its definition says.

    ONNX Runtime refuses other nodes with the same check. Graphs inside of a node are walked by `_check_graph`: onnx's
    own walk does not know the values around them. Attributes of functions that are given by the caller are not there,
    and the data of tensors elsewhere would be looked for in the working directory.
    """
    if node.domain not in ("", "ai.onnx") or any(_unseen(attribute) for attribute in node.attribute):
        return
    try:
        onnx.checker.check_node(node, context)
    except (onnx.checker.ValidationError, ValueError) as error:  # the latter where its own words are no text
        said = " ".join(str(error).split())
        raise ModelError(
            f"{where}: node {node.name!r} ({node.op_type}) is not what ONNX defines: {said:.300}; the file is damaged, "
            "or of a newer ONNX"
        ) from None


def _unseen(attribute: onnx.AttributeProto) -> bool:
    """Whether onnx's check of a node would go wrong at this attribute."""
    outside = attribute.t.data_location == onnx.TensorProto.EXTERNAL
    return attribute.type in _GRAPHS or bool(attribute.ref_attr_name) or outside


def _check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """A constant has as many bytes as its shape says, so that no declared shape makes anyone ask for more memory."""
    known = tensor.data_type in set(ir.DataType) and tensor.data_type != ir.DataType.UNDEFINED
    if not known or any(side < 0 for side in tensor.dims):
        raise ModelError(f"{where}: constant {tensor.name!r} has no type or shape of ONNX; the file is damaged")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    elements = prod(tensor.dims)
    if tensor.data_type == ir.DataType.STRING:
        if len(tensor.string_data) != elements:
            raise ModelError(
                f"{where}: constant {tensor.name!r} of shape {list(tensor.dims)} has {len(tensor.string_data)} texts; "
                "the file is damaged"
            )
        return
    expected = -(-elements * ir.DataType(tensor.data_type).bitwidth // 8)
    held = len(getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data")))
    if (
        (len(tensor.raw_data) != expected)
        if tensor.raw_data or not held
        else held > 2 * elements or 8 * held < elements
    ):
        raise ModelError(
            f"{where}: constant {tensor.name!r} of shape {list(tensor.dims)} would have {expected} bytes, and the file "
            f"has {len(tensor.raw_data)} and {held} numbers; it is damaged"
        )
