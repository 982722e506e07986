"""Products whose inputs get a range per token when they arrive, with the codes of narrowcast's modules.

DynamicQuantizeLinear knows one range for a whole tensor. Here every row x of the input is rounded as
`kernels.reference.quantize_rows` and `quantize_rows_asymmetric` do, in standard operators:

    symmetric     s = max|x| / 127;                     q = QuantizeLinear(x * (127 / max|x|), 1, 128)
    asymmetric    s = max(x, 0) / 255 - min(x, 0) / 255; q = QuantizeLinear(x * (1 / s), 1 per row, z per row)

ONNX Runtime 1.31.1 makes MatMulIntegerToFloat of DequantizeLinear(q, 1, 128), DequantizeLinear(W) and their MatMul,
whose input has one zero point. Row scales come behind it, and what the zero points of the rows add up to is one Gemm
with the bias: y = s * p + [s * (128 - z), 1] [s_w * sum(w); bias]. Scales of rows must not be multiplied with those of
the weight before they meet the sums: ONNX Runtime takes such a product for a scale of the whole input, and is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from narrowcast.core import QuantizedTensor
from narrowcast.models.onnx_layers import Use
from narrowcast.models.onnx_patterns import codes_of
from narrowcast.models.onnx_scribe import Scribe, opset_of, replace_node

Array = Any
# In the metadata: by the name of a weight's codes, what goes in and what comes out, and how the input is rounded.
TOKENS = "narrowcast.tokens"
# Ends the name of the constant that holds zero points' sums and bias: its Gemm is no layer.
EPILOGUE = "_zero_points_and_bias"
# Rows of less count as zero: their scale would overflow. narrowcast's kernels hand on zeros there.
_SMALLEST = np.float32(2.0**-100)
_AXES_AS_INPUT = 18  # the opset in which ReduceMax and ReduceMin take axes as an input


@dataclass(frozen=True)
class Rows:
    """An input in codes.

    Args:
        decoded: codes less 128, as the product reads them: [rows, columns], or the shape of the input where symmetric.
        scale: of every row: [rows, 1], or [..., 1] where symmetric.
        beside: [rows, 2], the scale times (128 - zero point), and 1; None where symmetric.
        sides: all sizes of the input but the last; None where the product has the rank of the input.
    """

    decoded: ir.Value
    scale: ir.Value
    beside: ir.Value | None
    sides: ir.Value | None


class _Before:
    """Writes nodes in front of one node."""

    def __init__(self, scribe: Scribe, node: ir.Node, stem: str, numbers: dict[Any, ir.Value]) -> None:
        self.scribe, self.node, self.stem, self.numbers = scribe, node, stem, numbers

    def add(self, op: str, *inputs: Any, **attributes: Any) -> ir.Value:
        """One node; numbers among its inputs become constants."""
        values = [value if isinstance(value, ir.Value) else self.number(value) for value in inputs]
        made: ir.Value = self.scribe.before(self.node, op, values, f"{self.stem}_{op}", attributes=attributes)
        return made

    def number(self, array: Any) -> ir.Value:
        """A constant that all products share."""
        array = np.asarray(array)
        key = ("number", str(array.dtype), array.shape, array.tobytes())
        if key not in self.numbers:
            self.numbers[key] = self.scribe.constant(array, f"token_{array.dtype}_{len(self.numbers)}")
        return self.numbers[key]

    def reduce(self, op: str, value: ir.Value, keepdims: int) -> ir.Value:
        """ReduceMax or ReduceMin along the last axis."""
        if opset_of(self.scribe.model) < _AXES_AS_INPUT:
            return self.add(op, value, axes=[-1], keepdims=keepdims)
        return self.add(op, value, np.array([-1], np.int64), keepdims=keepdims)

    def column(self, value: ir.Value) -> ir.Value:
        """[rows] as [rows, 1]."""
        return self.add("Unsqueeze", value, np.array([1], np.int64))


def per_token(
    scribe: Scribe, use: Use, record: QuantizedTensor, bias: Array | None, shared: dict[Any, Any], *, symmetric: bool
) -> str:
    """Integer product with a range per row of the input, found at run time.

    Args:
        scribe: writes.
        use: a Gemm or MatMul.
        record: int8 per channel or per tensor, symmetric.
        bias: [out] float32 of the node, or of the Add behind it; None without one.
        shared: rows by what they round, and constants; added to.
        symmetric: int8 codes; else uint8 with a zero point per row.

    Returns:
        The name of the codes.
    """
    adder = use.adder[0] if bias is not None and use.op == "MatMul" else None
    last, stem = adder or use.node, str(use.weight.name)
    codes, scale, _ = codes_of(record)
    scale = scale[:, 0]
    key = (id(use.node.graph), str(use.input.name), symmetric)
    if key not in shared:
        shared[key] = _rows(_Before(scribe, use.node, f"{use.input.name}_tokens", shared), use, record, symmetric)
    rows, write = shared[key], _Before(scribe, last, stem, shared)
    stored = scribe.constant(np.ascontiguousarray(codes.T).astype(np.int8), f"{stem}_quantized")
    parts = [scribe.constant(scale, f"{stem}_scale"), scribe.constant(np.zeros(scale.shape, np.int8), f"{stem}_zero")]
    product = write.add("MatMul", rows.decoded, write.add("DequantizeLinear", stored, *parts, axis=1))
    result = write.add("Mul", product, rows.scale)
    if rows.beside is None:
        result = result if bias is None else write.add("Add", result, scribe.constant(_flat(bias), f"{stem}_bias"))
    else:
        added = np.zeros_like(scale) if bias is None else _flat(bias)
        both = np.stack([scale * codes.sum(1).astype(np.float32), added]).astype(np.float32)
        result = write.add("Gemm", rows.beside, scribe.constant(both, f"{stem}{EPILOGUE}"), result)
    if rows.sides is not None:
        sides = write.add("Concat", rows.sides, np.array([codes.shape[0]], np.int64), axis=0)
        result = write.add("Reshape", result, sides)
    given = use.input
    replace_node(last, result)
    if adder is not None and use.node.graph is not None:
        use.node.graph.remove(use.node, safe=True)
    _note(scribe, str(stored.name), str(given.name), str(result.name), symmetric=symmetric)
    return str(stored.name)


def _flat(bias: Array) -> Array:
    return np.asarray(bias, np.float32).reshape(-1)


def _rows(write: _Before, use: Use, record: QuantizedTensor, symmetric: bool) -> Rows:
    return _symmetric(write, use.input) if symmetric else _asymmetric(write, use.input, record.shape[1])


def _symmetric(write: _Before, x: ir.Value) -> Rows:
    largest = write.add("Max", write.reduce("ReduceMax", write.add("Abs", x), 1), _SMALLEST)
    steps = write.add("Mul", x, write.add("Div", np.float32(127), largest))
    coded = write.add("QuantizeLinear", steps, np.float32(1), np.uint8(128))
    return Rows(_decoded(write, coded), write.add("Div", largest, np.float32(127)), None, None)


def _asymmetric(write: _Before, x: ir.Value, columns: int) -> Rows:
    sides = None
    if x.shape is None or len(x.shape) != 2:
        bounds = [np.array([end], np.int64) for end in (0, -1, 0)]
        sides = write.add("Slice", write.add("Shape", x), *bounds)
        x = write.add("Reshape", x, np.array([-1, columns], np.int64))
    low = write.add("Min", write.reduce("ReduceMin", x, 0), np.float32(0))
    high = write.add("Max", write.reduce("ReduceMax", x, 0), np.float32(0))
    steps = [write.add("Div", end, np.float32(255)) for end in (high, low)]
    scale = write.add("Max", write.add("Sub", *steps), _SMALLEST)
    inverse = write.add("Div", np.float32(1), scale)
    zero = write.add("QuantizeLinear", write.add("Neg", write.add("Mul", low, inverse)), np.float32(1), np.uint8(0))
    one = write.add("Div", scale, scale)  # x * inverse is rounded, as in the kernels: x / scale may be another code
    scaled = write.add("Mul", x, write.column(inverse))
    coded = write.add("QuantizeLinear", scaled, one, zero, axis=0)
    apart = write.add("Mul", write.add("Sub", np.float32(128), write.add("Cast", zero, to=1)), scale)
    beside = write.add("Concat", write.column(apart), write.column(one), axis=1)
    return Rows(_decoded(write, coded), write.column(scale), beside, sides)


def _decoded(write: _Before, coded: ir.Value) -> ir.Value:
    return write.add("DequantizeLinear", coded, np.float32(1), np.uint8(128))


def _note(scribe: Scribe, codes: str, given: str, output: str, *, symmetric: bool) -> None:
    noted: dict[str, Any] = json.loads(scribe.model.metadata_props.get(TOKENS, "{}"))
    noted[codes] = {"given": given, "output": output, "input": "int8/token" if symmetric else "uint8/token"}
    scribe.model.metadata_props[TOKENS] = json.dumps(noted)


def noted_product(noted: Mapping[str, Any], weight: str, names: set[str]) -> Mapping[str, Any] | None:
    """What is noted of the product of these codes, where the graph has the values that are named; None else."""
    found = noted.get(weight)
    if not isinstance(found, Mapping) or not {found.get("given"), found.get("output")} <= names:
        return None
    return found
