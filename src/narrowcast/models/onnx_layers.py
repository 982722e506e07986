"""Which constants of an ONNX graph are weights of layers, what multiplies them, and how they lie in memory.

One row per operator in KINDS; nothing else knows these operators' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from narrowcast.models.base import Layer, Site

Array = Any
RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Use:
    """One node that uses a weight.

    Args:
        node: the node.
        weight: the initializer.
        index: of the weight among the node's inputs.
        transposed: whether a Transpose of the last two axes lies between them.
        inside: whether the node is in a subgraph.
    """

    node: ir.Node
    weight: ir.Value
    index: int
    transposed: bool
    inside: bool

    @property
    def op(self) -> str:
        """The node's operator."""
        return str(self.node.op_type)

    @property
    def path(self) -> str:
        """The node's name; for a recurrent node, which has two weights, with the one that is meant."""
        name = str(self.node.name)
        return f"{name}.{self.parameter}" if self.op in RECURRENT else name

    @property
    def parameter(self) -> str:
        """The weight's name in the model; of a recurrent node what PyTorch calls it."""
        return {1: "weight_ih_l0", 2: "weight_hh_l0"}[self.index] if self.op in RECURRENT else str(self.weight.name)

    @property
    def input(self) -> Any:
        """The value that the weight multiplies; the indices of a lookup; None for hidden states, which no one sees."""
        if self.op in RECURRENT and self.index > 1:
            return None
        return self.node.inputs[1 if self.op == "Gather" else 0]

    @property
    def bias(self) -> Any:
        """The value added to every output channel, by the node itself or by an Add behind a MatMul; None without."""
        node, index = self.adder
        return node.inputs[index] if node is not None and len(node.inputs) > index else None

    @property
    def adder(self) -> tuple[Any, int]:
        """The node that adds the bias and the index among its inputs; (None, 0) where no node does."""
        if self.op in BIASED:
            return self.node, 2
        readers = list(self.node.outputs[0].uses()) if self.op == "MatMul" else []
        if len(readers) != 1 or readers[0][0].op_type != "Add" or self.node.outputs[0].is_graph_output():
            return None, 0
        node, index = readers[0][0], 1 - readers[0][1]
        tensor = None if node.inputs[index] is None else node.inputs[index].const_value
        return (node, index) if tensor is not None and len(tensor.shape) == 1 else (None, 0)

    @property
    def bias_array(self) -> Any:
        """The bias [out] float32; None where there is none, or it is no constant."""
        tensor = None if self.bias is None else self.bias.const_value
        return None if tensor is None else np.asarray(tensor.numpy(), np.float32).reshape(-1)

    @property
    def rank(self) -> int | None:
        """Axes of the output; None where it is not known."""
        shape = self.node.outputs[0].shape
        return None if shape is None else len(shape)


BIASED = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Kind:
    """How one operator reads a weight.

    Args:
        type: (weight's rank) -> the layer's type as recipes name it.
        index: of the weight among the inputs.
        refuse: use -> why this one cannot be quantized; "" when it can.
        matrix: (array, use) -> [out, in * kernel].
        restore: (matrix, use) -> the array that the node reads, for codes as for values.
        axis: use -> the axis of that array along which output channels lie.
    """

    type: Callable[[int], str]
    index: int
    refuse: Callable[[Use], str]
    matrix: Callable[[Array, Use], Array]
    restore: Callable[[Array, Use], Array]
    axis: Callable[[Use], int]


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def _shape(use: Use) -> tuple[int, ...]:
    return tuple(int(side) for side in use.weight.const_value.shape)


def _input_first(use: Use) -> bool:
    """Whether the stored array of a product is [in, out]."""
    across = bool(attribute(use.node, "transB", 0)) if use.op == "Gemm" else False
    return across == use.transposed


def _refuse_product(use: Use) -> str:
    if len(_shape(use)) != 2:
        return f"its constant has {len(_shape(use))} axes: a stack of matrices, not one"
    if use.op == "Gemm" and (attribute(use.node, "transA", 0) or attribute(use.node, "alpha", 1.0) != 1.0):
        return "Gemm with transA or alpha multiplies what no integer kernel does"
    if use.op == "Gemm" and use.bias is not None and attribute(use.node, "beta", 1.0) != 1.0:
        return "Gemm with beta multiplies its bias, which no integer kernel does"
    return ""


def _refuse_deconvolution(use: Use) -> str:
    if attribute(use.node, "group", 1) != 1:
        return "grouped transposed convolutions are not supported"
    return "its weight is transposed" if use.transposed else ""


def _refuse_recurrent(use: Use) -> str:
    if attribute(use.node, "layout", 0) != 0:
        return f"{use.op} with layout 1 has no kernel in ONNX Runtime"
    return "its weight is transposed" if use.transposed else ""


def _recurrent(op: str) -> Kind:
    return Kind(
        lambda rank: op,
        1,
        _refuse_recurrent,
        lambda array, use: array.reshape(-1, array.shape[-1]),
        lambda matrix, use: matrix.reshape(_shape(use)),
        lambda use: 1,
    )


def _across(array: Array, use: Use) -> Array:
    return array.T if _input_first(use) else array


def reads_input_first(use: Use) -> bool:
    """Whether the node of a product reads its weight as [in, out], whatever lies between it and the constant."""
    return not (use.op == "Gemm" and bool(attribute(use.node, "transB", 0)))


def _read_by(matrix: Array, use: Use) -> Array:
    return matrix.T if reads_input_first(use) else matrix


_PRODUCT = Kind(lambda rank: "Linear", 1, _refuse_product, _across, _read_by, lambda use: int(reads_input_first(use)))
KINDS: dict[str, Kind] = {
    "Conv": Kind(
        lambda rank: f"Conv{rank - 2}d",
        1,
        lambda use: "its weight is transposed" if use.transposed else "",
        lambda array, use: array.reshape(array.shape[0], -1),
        lambda matrix, use: matrix.reshape(_shape(use)),
        lambda use: 0,
    ),
    "ConvTranspose": Kind(
        lambda rank: f"ConvTranspose{rank - 2}d",
        1,
        _refuse_deconvolution,
        lambda array, use: np.swapaxes(array, 0, 1).reshape(array.shape[1], -1),
        lambda matrix, use: np.swapaxes(matrix.reshape(_shape(use)[1], _shape(use)[0], *_shape(use)[2:]), 0, 1),
        lambda use: 1,
    ),
    "Gemm": _PRODUCT,
    "MatMul": _PRODUCT,
    "LSTM": _recurrent("LSTM"),
    "GRU": _recurrent("GRU"),
    "Gather": Kind(
        lambda rank: "Embedding",
        0,
        lambda use: "" if len(_shape(use)) == 2 and not use.transposed and attribute(use.node, "axis", 0) == 0
        else "rows of a table are looked up along its first of two axes, and this one is read otherwise",
        lambda array, use: array,
        lambda matrix, use: matrix,
        lambda use: 0,
    ),
}  # fmt: skip


def constant_of(value: Any) -> tuple[Any, bool]:
    """The initializer that a value is, and whether through a Transpose of two axes; (None, False) if it is none."""
    if value is None:
        return None, False
    producer = value.producer()
    if producer is None:
        return (value, False) if value.const_value is not None and value.is_initializer() else (None, False)
    if producer.op_type == "Identity" and producer.domain == "":
        return constant_of(producer.inputs[0])
    if producer.op_type == "Transpose" and list(attribute(producer, "perm", [1, 0])) == [1, 0]:
        found, turned = constant_of(producer.inputs[0])
        if found is not None and len(found.const_value.shape) == 2:
            return found, not turned
    return None, False


def find_uses(model: ir.Model) -> dict[str, list[Use]]:
    """Every use of a float constant by a known operator, in the order of the nodes.

    Returns:
        By the initializer's name; graphs inside others may use a name again, which gets a mark.
    """
    found: dict[str, list[Use]] = {}
    names: dict[int, str] = {}
    for node in model.graph.all_nodes():
        kind = KINDS.get(node.op_type) if node.domain == "" else None
        indices = () if kind is None else (1, 2) if node.op_type in RECURRENT else (kind.index,)
        for index in indices:
            weight, transposed = constant_of(node.inputs[index] if len(node.inputs) > index else None)
            if weight is None or weight.const_value.dtype != ir.DataType.FLOAT or len(weight.const_value.shape) < 2:
                continue
            key = names.get(id(weight)) or str(weight.name)
            while id(weight) not in names and key in found:
                key += "'"
            names[id(weight)] = key
            found.setdefault(key, []).append(Use(node, weight, index, transposed, node.graph is not model.graph))
    return found


def find_layers(model: ir.Model, uses: dict[str, list[Use]]) -> Iterator[Layer]:
    """Every weight once, in the order of its first use; other constants of two or more axes are "Parameter"s."""
    vocabularies = {_shape(rows[0])[0] for rows in uses.values() if rows[0].op == "Gather"}
    names: set[str] = set()
    for key, rows in uses.items():
        layer = _layer(key, rows, vocabularies)
        name = layer.name
        while name in names:
            name += "'"
        names.add(name)
        yield Layer(name, layer.type, layer.shape, layer.sites, layer.role, layer.reason, layer.bytes)
    yield from _parameters(model, uses)


def _layer(key: str, uses: list[Use], vocabularies: set[int]) -> Layer:
    first = uses[0]
    kind, shape = KINDS[first.op], _shape(first)
    reason = next((why for use in uses if (why := KINDS[use.op].refuse(use))), "")
    types = {KINDS[use.op].type(len(shape)) for use in uses}
    if not reason and prod(shape) == 0:
        reason = f"the weight is empty: {'x'.join(map(str, shape))}"
    matrix = shape if reason else _matrix_shape(first)
    if not reason and any(_matrix_shape(use) != matrix or _lies(use) != _lies(first) for use in uses):
        reason = "it is used in two orientations"
    if not reason and len(types) > 1 and not types <= {"Linear", "Embedding"}:
        reason = f"{' and '.join(sorted(types))} read it in different layouts"
    if not reason:
        reason = next((why for use in uses if (why := _shared_otherwise(use))), "")
    role = ""
    if "Embedding" in types:
        role = "embedding" if types == {"Embedding"} else "tied"
    elif types == {"Linear"} and matrix[0] in vocabularies:
        role = "head"
    sites = tuple(Site(use.path, use.parameter if use.op in RECURRENT else key, KINDS[use.op].type(len(shape)))
                  for use in uses)  # fmt: skip
    return Layer(layer_name(first), kind.type(len(shape)), matrix, sites, role, reason, 4 * prod(shape))


def _shared_otherwise(use: Use) -> str:
    """Whether the initializer is a graph input too, so that a caller may replace it."""
    if use.weight.is_graph_input():
        return "it is an input of the graph as well: a caller may pass another weight"
    return ""


def _lies(use: Use) -> int:
    """The axis of the constant along which output channels lie."""
    return int(_input_first(use)) if use.op in ("Gemm", "MatMul") else KINDS[use.op].axis(use)


def _matrix_shape(use: Use) -> tuple[int, ...]:
    shape = _shape(use)
    if use.op in ("Gemm", "MatMul"):
        return shape[::-1] if _input_first(use) else shape
    if use.op == "ConvTranspose":
        return shape[1], shape[0] * prod(shape[2:])
    if use.op in RECURRENT:
        return prod(shape[:-1]), shape[-1]
    return shape[0], prod(shape[1:])


def layer_name(use: Use) -> str:
    """The weight's name where the exporter kept the module's, else the node's."""
    name = str(use.weight.name)
    if use.op in RECURRENT:
        return use.path
    if "::" in name or name.startswith(("val_", "/")) or not any(part.isalpha() for part in name.split(".")):
        return str(use.node.name)
    return name.removesuffix(".weight")


def _parameters(model: ir.Model, uses: dict[str, list[Use]]) -> Iterator[Layer]:
    """Float constants of two or more axes that no known operator multiplies, with what reads them."""
    known = {id(rows[0].weight) for rows in uses.values()}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or id(value) in known or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
                continue
            readers = sorted({node.op_type for node in value.consumers()})
            shape = tuple(int(side) for side in tensor.shape)
            yield Layer(str(value.name), "Parameter", shape, (Site(str(value.name), str(value.name), "Parameter"),), "",
                        why_not(readers, shape), 4 * prod(shape))  # fmt: skip


def why_not(readers: list[str], shape: tuple[int, ...]) -> str:
    """Why a constant read by these operators is no layer."""
    if "RNN" in readers:
        return "RNN has no integer kernel in ONNX Runtime"
    if any(reader in RECURRENT for reader in readers):
        return f"a bias, a state or peepholes of {' and '.join(readers)}"
    if not readers:
        return "no node reads it"
    if prod(shape) == max(shape, default=0):
        return f"a vector, read by {', '.join(readers)}"
    return f"read by {', '.join(readers)}, which multiply no weight"
