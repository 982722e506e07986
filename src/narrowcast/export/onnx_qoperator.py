"""Q and DQ nodes around float operators as operators that read and write codes: ONNX's older form, QOperator.

    DQ(x), DQ(W), DQ(bias) -> Conv [-> Relu, Clip] -> Q     QLinearConv
    the same -> Gemm, or MatMul of two axes with its bias   QGemm (com.microsoft), with or without Q
    DQ(a), DQ(b) -> MatMul -> Q                             QLinearMatMul; without Q MatMulIntegerToFloat
    DQ -> Add, Mul, Concat, AveragePool, ... -> Q           QLinearAdd, ... (com.microsoft)
    DQ -> MaxPool, Reshape, ... -> Q of the same scale      the same operator on codes

It is what ONNX Runtime makes of the QDQ form when it opens a file, and what builds without these rewrites need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from narrowcast.models.onnx_layers import attribute
from narrowcast.models.onnx_prepare import infer_shapes
from narrowcast.models.onnx_scribe import MICROSOFT, Scribe, replace_node
from narrowcast.models.onnx_static import IN_CODES, SAME_CODES

_RECTIFIERS = ("Relu", "Clip")
_ROOM = 1 + 1e-6  # of float32 scales, at the upper end of a Clip


@dataclass(frozen=True)
class Coded:
    """A value as codes: `codes`, `scale`, `zero` are values of the graph."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value

    @property
    def parts(self) -> list[ir.Value]:
        """In the order that QLinear operators have."""
        return [self.codes, self.scale, self.zero]


@dataclass(frozen=True)
class Rounded:
    """What rounds the output of a node: the Q nodes, all alike, and the Relu or Clip that they make superfluous."""

    scale: ir.Value
    zero: ir.Value
    nodes: list[ir.Node]


class CannotBeError(Exception):
    """Why a node keeps its Q and DQ nodes."""


def to_qoperator(model: ir.Model) -> list[str]:
    """Rewrite a model in QDQ form, in place.

    Args:
        model: changed; the function stays the same but for the rounding of sums that ONNX Runtime does anyway.

    Returns:
        Notes: how many nodes stay as they were, by reason.
    """
    infer_shapes(model)
    scribe = Scribe(model)
    left: Counter[str] = Counter()
    done = 0
    for node in list(model.graph.all_nodes()):
        rule = _RULES.get(node.op_type)
        if node.graph is None or rule is None or node.domain or not _reads_codes(node):
            continue
        try:
            rule(scribe, node)
            done += 1
        except CannotBeError as reason:
            left[f"{node.op_type} between Q and DQ: {reason}"] += 1
    if done:
        model.opset_imports.setdefault(MICROSOFT, 1)
    notes = [f"{count} {text}" for text, count in left.items()]
    return notes if done or notes else ["nothing in the model is in QDQ form, so there is nothing to rewrite"]


def _reads_codes(node: ir.Node) -> bool:
    """Whether the inputs that a node computes with come out of DequantizeLinear."""
    values = node.inputs[:1] if node.op_type in SAME_CODES else node.inputs[:2]
    return all(_maker(value) == "DequantizeLinear" for value in values if value is not None)


def _maker(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "" if node is None else node.op_type


def _coded(scribe: Scribe, value: ir.Value | None) -> Coded:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        raise CannotBeError("one of its inputs is float")
    if attribute(node, "block_size", 0):
        raise CannotBeError("its weight has scales per block")
    codes, scale = node.inputs[0], node.inputs[1]
    assert codes is not None and scale is not None
    return Coded(codes, scale, _zero(scribe, node, codes, scale))


def _zero(scribe: Scribe, node: ir.Node, codes: ir.Value | None, scale: ir.Value) -> ir.Value:
    """The zero point of a Q or DQ node; 0 where it has none."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node.inputs[2]
    dtype = np.uint8 if codes is None or codes.dtype is None else codes.dtype.numpy()
    sides = () if scale.const_value is None else tuple(scale.const_value.shape)
    return scribe.constant(np.zeros(sides, dtype), f"{node.outputs[0].name}_zero_point")


def _rounded(scribe: Scribe, value: ir.Value) -> Rounded | None:
    """What rounds a value; None where it is wanted in float."""
    readers = [reader for reader, _ in value.uses()]
    between: list[ir.Node] = []
    if len(readers) == 1 and readers[0].op_type in _RECTIFIERS and not value.is_graph_output():
        between = [readers[0]]
        value = readers[0].outputs[0]
        readers = [reader for reader, _ in value.uses()]
    if not readers or value.is_graph_output() or any(reader.op_type != "QuantizeLinear" for reader in readers):
        return None
    scale, zero = readers[0].inputs[1], _zero(scribe, readers[0], None, readers[0].inputs[1])
    if len({(_number(r.inputs[1]), _number(_zero(scribe, r, None, r.inputs[1]))) for r in readers}) > 1:
        return None
    for node in between:
        _check_rectifier(node, _number(scale), zero)
    return Rounded(scale, zero, [*readers, *between])


def _number(value: ir.Value | None) -> float:
    if value is None or value.const_value is None or value.const_value.size != 1:
        raise CannotBeError("a scale or zero point is not one constant")
    return float(value.const_value.numpy().reshape(()))


def _check_rectifier(node: ir.Node, scale: float, zero: ir.Value) -> None:
    """Rounding to codes does what a Relu or Clip does, where the lowest code is 0 and the highest is not above it."""
    kind = np.iinfo(zero.const_value.numpy().dtype) if zero.const_value is not None else np.iinfo(np.uint8)
    if _number(zero) != kind.min:
        raise CannotBeError(f"the zero point behind its {node.op_type} is not the lowest code")
    if node.op_type == "Clip":
        low, high = (
            _number(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else default
            for i, default in ((1, -np.inf), (2, np.inf))
        )
        if low != 0.0 or scale * (kind.max - kind.min) > high * _ROOM:
            raise CannotBeError("its codes reach beyond its Clip")


def _must_round(scribe: Scribe, node: ir.Node) -> Rounded:
    rounded = _rounded(scribe, node.outputs[0])
    if rounded is None:
        raise CannotBeError("its output is also wanted in float")
    return rounded


def _write(
    scribe: Scribe, node: ir.Node, op: str, inputs: list[Any], rounded: Rounded | None, *, domain: str = "", **more: Any
) -> None:
    """Put the new operator in place of `node` and of what rounds its output."""
    attributes = {key: value.value for key, value in node.attributes.items()} | more
    made = scribe.before(node, op, inputs, f"{node.name}_{op}", domain=domain, attributes=attributes)
    _put(node, made, rounded)


def _put(node: ir.Node, made: ir.Value, rounded: Rounded | None) -> None:
    if rounded is None:
        replace_node(node, made)
        return
    for reader in rounded.nodes:
        if reader.op_type == "QuantizeLinear":
            made.type = reader.outputs[0].type
            reader.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
    for gone in [*rounded.nodes, node]:
        _remove(gone)


def _remove(node: ir.Node) -> None:
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _bias(value: ir.Value | None) -> ir.Value | None:
    """The int32 codes of a bias; None where there is none."""
    if value is None:
        return None
    if _maker(value) != "DequantizeLinear":
        raise CannotBeError("its bias is float")
    codes: ir.Value | None = value.producer().inputs[0]  # type: ignore[union-attr]
    return codes


def _conv(scribe: Scribe, node: ir.Node) -> None:
    x, weight = _coded(scribe, node.inputs[0]), _coded(scribe, node.inputs[1])
    bias = _bias(node.inputs[2] if len(node.inputs) > 2 else None)
    rounded = _must_round(scribe, node)
    inputs = [*x.parts, *weight.parts, rounded.scale, rounded.zero, *([] if bias is None else [bias])]
    _write(scribe, node, "QLinearConv", inputs, rounded)


def _gemm(scribe: Scribe, node: ir.Node) -> None:
    x, weight = _coded(scribe, node.inputs[0]), _coded(scribe, node.inputs[1])
    bias = _bias(node.inputs[2] if len(node.inputs) > 2 else None)
    if attribute(node, "beta", 1.0) != 1.0:
        raise CannotBeError("its beta is not 1")
    rounded = _rounded(scribe, node.outputs[0])
    ends = [] if rounded is None else [rounded.scale, rounded.zero]
    node.attributes.pop("beta", None)
    _write(scribe, node, "QGemm", [*x.parts, *weight.parts, bias, *ends], rounded, domain=MICROSOFT)


def _matmul(scribe: Scribe, node: ir.Node) -> None:
    a, b = _coded(scribe, node.inputs[0]), _coded(scribe, node.inputs[1])
    rounded = _rounded(scribe, node.outputs[0])
    if rounded is not None:
        _write(scribe, node, "QLinearMatMul", [*a.parts, *b.parts, rounded.scale, rounded.zero], rounded)
        return
    add, bias = _added(node)
    if add is not None:
        behind = _rounded(scribe, add.outputs[0])
        ends = [] if behind is None else [behind.scale, behind.zero]
        made = scribe.before(add, "QGemm", [*a.parts, *b.parts, bias, *ends], f"{node.name}_QGemm", domain=MICROSOFT)
        _put(add, made, behind)
        _remove(node)
        return
    inputs = [a.codes, b.codes, a.scale, b.scale, a.zero, b.zero]
    _write(scribe, node, "MatMulIntegerToFloat", inputs, None, domain=MICROSOFT)


def _added(node: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add of an int32 bias behind a product of two axes, and the bias's codes."""
    value, shape = node.outputs[0], node.inputs[0].shape if node.inputs[0] is not None else None
    readers = [reader for reader, _ in value.uses()]
    if shape is None or len(shape) != 2 or len(readers) != 1 or readers[0].op_type != "Add" or value.is_graph_output():
        return None, None
    other = next((one for one in readers[0].inputs if one is not value), None)
    if _maker(other) != "DequantizeLinear":
        return None, None
    bias = _bias(other)
    whole = bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1
    return (readers[0], bias) if whole else (None, None)


def _in_codes(scribe: Scribe, node: ir.Node) -> None:
    inputs = [_coded(scribe, value) for value in node.inputs if value is not None]
    rounded = _must_round(scribe, node)
    ends = [rounded.scale, rounded.zero]
    parts = [part for value in inputs for part in value.parts]
    ordered = [*ends, *parts] if node.op_type == "Concat" else [*parts, *ends]
    _write(scribe, node, f"QLinear{node.op_type}", ordered, rounded, domain=MICROSOFT)


def _same_codes(scribe: Scribe, node: ir.Node) -> None:
    given = _coded(scribe, node.inputs[0])
    rounded = _must_round(scribe, node)
    if (_number(given.scale), _number(given.zero)) != (_number(rounded.scale), _number(rounded.zero)):
        raise CannotBeError("its input and output have other scales")
    if len(rounded.nodes) > sum(reader.op_type == "QuantizeLinear" for reader in rounded.nodes):
        raise CannotBeError("a Relu or Clip is behind it")
    _write(scribe, node, node.op_type, [given.codes, *node.inputs[1:]], rounded)


_RULES: dict[str, Callable[[Scribe, ir.Node], None]] = {
    "Conv": _conv, "Gemm": _gemm, "MatMul": _matmul,
    **dict.fromkeys(IN_CODES, _in_codes), **dict.fromkeys(SAME_CODES, _same_codes),
}  # fmt: skip
