"""What ONNX Runtime really runs: the graph that it optimizes a model to, read back."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from narrowcast.errors import ModelError
from narrowcast.models.onnx_file import is_large, stored_size
from narrowcast.models.onnx_large import hollow
from narrowcast.models.onnx_portable import risk_in_graph
from narrowcast.models.onnx_session import open_session
from narrowcast.models.onnx_tokens import EPILOGUE

# Operators of ONNX Runtime that multiply integers.
INTEGER_KERNELS = (
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger",
    "ConvInteger", "DynamicQuantizeLSTM",
)  # fmt: skip
# Operators that multiply floats; the later ones have no other form.
_NEVER = ("ConvTranspose", "LSTM", "GRU", "RNN", "Attention", "MultiHeadAttention")
FLOAT_PRODUCTS = (
    "Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul",
    "MatMulNBits", "Einsum", *_NEVER,
)  # fmt: skip
# These compute nothing, or turn codes into values and back.
_MOVES = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Reshape", "Transpose", "Identity", "Shape",
    "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Constant", "ConstantOfShape", "Expand", "Flatten", "If",
    "Loop", "Range", "Size", "Split", "Pad",
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


@dataclass(frozen=True)
class NodeVerdict:
    """What ONNX Runtime does with one product.

    Args:
        node: its name in the optimized graph.
        kernel: the operator that runs.
        integer: whether it multiplies integers.
        bits: of the stored weight; 32 for float32, 0 for a product of two activations.
        reason: why it is float, and what would change that; "" for integers.
        saturates: what can go wrong on CPUs without VNNI; "" where nothing can, or a model is too large to look at its
            weights.
    """

    node: str
    kernel: str
    integer: bool
    bits: int
    reason: str = ""
    saturates: str = ""


def optimized_graph(model: ir.Model) -> onnx.GraphProto:
    """The graph that ONNX Runtime makes of a model and runs.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    with tempfile.TemporaryDirectory() as folder, hollow(model) as copy:
        path = Path(folder) / "optimized.onnx"
        open_session(copy, optimized=path)
        return onnx.load_model(path, load_external_data=not is_large(stored_size(model))).graph


def graph_that_runs(model: ir.Model, original: ir.Model) -> tuple[onnx.GraphProto, list[str]]:
    """The graph that ONNX Runtime makes of what was quantized, and notes.

    A file that ONNX Runtime could not open before has operators of somebody else's; its own graph stands in.

    Args:
        model: what was quantized.
        original: what it was made of.

    Raises:
        ModelError: ONNX Runtime opens the original, and not what was made of it.
    """
    try:
        return optimized_graph(model), []
    except ModelError as error:
        if _opens(original):
            raise
        with hollow(model) as copy:
            graph = ir.to_proto(copy).graph
        return graph, [f"what ONNX Runtime runs was not checked, as it does not open the float model either: {error}"]


def _opens(model: ir.Model) -> bool:
    try:
        optimized_graph(model)
    except ModelError:
        return False
    return True


def kernels_of(graph: onnx.GraphProto, constants: Mapping[str, str]) -> dict[str, Kernel]:
    """What ONNX Runtime runs for each of these constants.

    Args:
        graph: from `optimized_graph`.
        constants: names of initializers, by path.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for owner in _graphs(graph):
        for node in owner.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
    return {path: _kernel(name, readers) for path, name in constants.items()}


def node_verdicts(graph: onnx.GraphProto) -> list[NodeVerdict]:
    """Every product of the optimized graph, in its order: the kernel, the bits, and why it is float where it is."""
    weights: dict[str, int] = {}
    constants: dict[str, onnx.TensorProto] = {}
    makers: dict[str, onnx.NodeProto] = {}
    for owner in _graphs(graph):
        numbers = [t for t in owner.initializer if t.data_type != onnx.TensorProto.STRING]
        weights |= {t.name: ir.DataType(t.data_type).bitwidth for t in numbers if len(t.dims) > 1}
        constants |= {t.name: t for t in owner.initializer}
        makers |= {name: node for node in owner.node for name in node.output}
    products = (*INTEGER_KERNELS, *FLOAT_PRODUCTS)
    nodes = (node for owner in _graphs(graph) for node in owner.node if node.op_type in products and not _ends(node))
    return [
        replace(_verdict(node, weights, makers), saturates=f"{risk} without VNNI" if risk else "")
        for node in nodes
        for risk in [risk_in_graph(node, constants)]
    ]


def _ends(node: onnx.NodeProto) -> bool:
    """Whether a Gemm adds a bias, and what zero points of rows add up to, to an integer product."""
    return node.op_type == "Gemm" and node.input[1].endswith(EPILOGUE)


def other_operators(graph: onnx.GraphProto) -> dict[str, int]:
    """How often each operator that is no product, and works on float values, runs."""
    counted = Counter(node.op_type for owner in _graphs(graph) for node in owner.node)
    known = (*INTEGER_KERNELS, *FLOAT_PRODUCTS, *_MOVES)
    return {op: count for op, count in counted.most_common() if op not in known and not op.startswith("QLinear")}


def _verdict(node: onnx.NodeProto, weights: Mapping[str, int], makers: Mapping[str, onnx.NodeProto]) -> NodeVerdict:
    through: list[str] = []
    bits = 0
    for name in node.input[1:]:
        while name in makers and makers[name].op_type in _PASSED and name not in weights:
            through.append(makers[name].op_type)
            name = makers[name].input[0]
        if bits := weights.get(name, 0):
            break
    attributes = {a.name: a.i for a in node.attribute}
    bits = attributes.get("bits", bits) if node.op_type == "MatMulNBits" else bits
    if node.op_type in INTEGER_KERNELS or (node.op_type == "MatMulNBits" and attributes.get("accuracy_level") == 4):
        return NodeVerdict(node.name, node.op_type, True, bits)
    coded = node.input[0] in makers and makers[node.input[0]].op_type == "DequantizeLinear"
    return NodeVerdict(node.name, node.op_type, False, bits, _why_float(node.op_type, bits, through, coded=coded))


def _why_float(op: str, bits: int, through: list[str], *, coded: bool) -> str:
    if op == "MatMulNBits":
        return "its input is float, as weight-only formats have it; give the rule an input, as dynamic-int8 does"
    if op == "LSTM" and bits:
        kind = "dequantized at every run" if "DequantizeLinear" in through else "floats"
        return f"its weights are {kind}; int8/channel weights with an input make it integer, as in dynamic-int8"
    if op in _NEVER:
        return f"ONNX Runtime has no integer kernel for {op}"
    if not bits:
        return "a product of two activations, of which recipes do not speak"
    if bits >= 16:
        return "its weight is a float: no rule quantized it"
    if not coded and "DequantizeLinear" in through:
        return "its weight is dequantized at every run, since its input is float; give it a static or dynamic input"
    if "Conv" in op:
        return "no QuantizeLinear follows it, or one whose zero point is not the code of its Relu's or Clip's lower end"
    return "its bias is float, or its weight has no zero point; write the bias as int32, and zero points of 0"


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
