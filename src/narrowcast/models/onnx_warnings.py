"""Where ONNX Runtime computes something other than what the file says: found in the graph that it runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import onnx_ir as ir

from narrowcast.models.onnx_verdict import optimized_graph

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def warnings_of(model: ir.Model) -> list[str]:
    """Sentences on changed arithmetic; empty where ONNX Runtime does what the file says.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    ran = optimized_graph(model)
    asked = Counter(node.op_type for node in model.graph.all_nodes())
    found = [_blocks(model, ran), _signed(model, ran), _half(model, ran)]
    if count := asked["DynamicQuantizeLinear"]:
        found.append(
            f"{count} inputs get one range for the whole batch when it arrives (DynamicQuantizeLinear), so that an "
            "answer depends on what else is in the batch"
        )
    return [text for text in found if text]


def _level(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "accuracy_level"), 0)


def _blocks(model: ir.Model, ran: onnx.GraphProto) -> str:
    """Products of float inputs that round them to 8 bits."""
    coarse = sum(node.op_type == "MatMulNBits" and _level(node) == 4 for node in ran.node)
    if not coarse:
        return ""
    written = sum(node.op_type == "MatMulNBits" for node in model.graph.all_nodes())
    if not written:
        return (
            f"ONNX Runtime makes {coarse} products of a float input and a dequantized weight MatMulNBits of level 4, "
            "which rounds the input to int8 per block, although the file has it as a float; the session option "
            "session.qdq_matmulnbits_accuracy_level = 1 keeps it"
        )
    return f"{coarse} MatMulNBits are of level 4: their inputs are rounded to int8 per block"


def _signed(model: ir.Model, ran: onnx.GraphProto) -> str:
    """Signed codes of inputs that run as unsigned ones."""
    made = (node for node in model.graph.all_nodes() if node.op_type == "QuantizeLinear" and len(node.inputs) > 2)
    signed = sum(node.inputs[2] is not None and node.inputs[2].dtype == ir.DataType.INT8 for node in made)
    rewritten = sum(node.op_type == "QuantizeLinear" and "s8_to_u8" in "".join(node.input) for node in ran.node)
    if not signed or not rewritten:
        return ""
    return (
        f"ONNX Runtime rewrites {rewritten} of {signed} int8 inputs to uint8 with 128 added on this CPU: the same "
        "values, in another kernel than where int8 runs as it is"
    )


def _half(model: ir.Model, ran: onnx.GraphProto) -> str:
    """16-bit floats that are computed in 32 bits."""
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    half = sum(value.dtype in _HALF for value in values if value.type is not None)
    stored = sum(v.dtype in _HALF for v in model.graph.initializers.values())
    if not half and not stored:
        return ""
    casts = sum(node.op_type == "Cast" for node in ran.node)
    if half and casts:
        return (
            "fp16 is computed in float32 on this CPU: ONNX Runtime puts Casts around products, and only their results "
            "are rounded"
        )
    return "weights in 16 bits are cast to float32 when the model is loaded, and products are computed in float32"
