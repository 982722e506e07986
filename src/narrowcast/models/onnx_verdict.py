"""What ONNX Runtime really runs: the graph that it optimizes a model to, read back."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from narrowcast.models.onnx_session import open_session

# Operators of ONNX Runtime that multiply integers.
INTEGER_KERNELS = (
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger",
    "ConvInteger", "DynamicQuantizeLSTM",
)  # fmt: skip
_PASSED = ("DequantizeLinear", "Cast", "Reshape", "Transpose", "Identity")


@dataclass(frozen=True)
class Kernel:
    """What reads a constant in the optimized graph.

    Args:
        op: the operator, "" where nothing does.
        integer: whether it multiplies integers.
        through: the operators between them: a DequantizeLinear means a product in float.
    """

    op: str
    integer: bool
    through: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.op:
            return "not found in the graph that ONNX Runtime runs"
        return f"{self.op} in float, behind {' and '.join(self.through)}" if self.through else self.op


def kernels_of(model: ir.Model, constants: Mapping[str, str]) -> dict[str, Kernel]:
    """What ONNX Runtime runs for each of these constants.

    Args:
        model: as it will be written.
        constants: names of initializers, by path.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, optimized=path)
        graph = onnx.load_model(path, load_external_data=False).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for owner in _graphs(graph):
        for node in owner.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
    return {path: _kernel(name, readers) for path, name in constants.items()}


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inside = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph, *(deeper for found in inside for deeper in _graphs(found))]


def _kernel(name: str, readers: Mapping[str, list[onnx.NodeProto]]) -> Kernel:
    through: list[str] = []
    while name in readers:
        node = readers[name][0]
        if node.op_type not in _PASSED:
            level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
            blocks = node.op_type == "MatMulNBits" and level == 4
            return Kernel(node.op_type, not through and (node.op_type in INTEGER_KERNELS or blocks), tuple(through))
        through.append(node.op_type)
        name = node.output[0]
    return Kernel("", integer=False)
