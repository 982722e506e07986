"""The layers of an ONNX graph, quantized or not, as seen from outside: what goes in and comes out, and in which codes.

A layer is a product with a constant, its bias, and the Relu or Clip behind it where its output is rounded only there;
or a recurrent node, which gets lengths and initial states beside its input where these are no constants.
What lies between codes is one kernel in ONNX Runtime, so values are looked at as codes where they are codes: asking for
the float value in front of a QuantizeLinear would make ONNX Runtime compute it in float.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from narrowcast.models.onnx_layers import RECURRENT, attribute
from narrowcast.models.onnx_static import rectified
from narrowcast.models.onnx_tokens import EPILOGUE, TOKENS, noted_product

Array = Any
LAYERS, RANGES = "narrowcast.layers", "narrowcast.ranges"
# Operator -> index of the weight and of the data among its inputs.
_PRODUCTS = {
    "Conv": (1, 0), "ConvTranspose": (1, 0), "Gemm": (1, 0), "MatMul": (1, 0), "MatMulNBits": (1, 0),
    "ConvInteger": (1, 0), "MatMulInteger": (1, 0), "Gather": (0, 1),
}  # fmt: skip
_INTEGER_RECURRENT = "DynamicQuantizeLSTM"
# Inputs of a recurrent node that may be values: lengths, initial hidden and cell states.
_BESIDE = (4, 5, 6)
_PASSED = ("DequantizeLinear", "QuantizeLinear", "Cast", "Reshape", "Transpose", "Identity")
# What follows a product and belongs to it: operator, and whether it must be there.
_BEHIND = {
    "ConvInteger": (("Cast", True), ("Mul", True), ("Add", False)),
    "MatMulInteger": (("Cast", True), ("Mul", True), ("Add", False)),
    "MatMulNBits": (("Add", False),),
    "MatMul": (("Add", False),),
    "Gather": (("Cast", True), ("Sub", False), ("Mul", True)),
}
_SUFFIXES = ("_quantized", "_Q2", "_Q4", "_Q8", "_fp16", "_bf16", ".weight")


@dataclass(frozen=True, eq=False)
class Ranges:
    """What codes mean: value = (code - zero) * scale.

    Args:
        scale: [channels] or [1] float32.
        zero: [channels] or [1] int64.
        axis: of the channels.
        signed: whether they go from -128 to 127, else from 0 to 255.
    """

    scale: Array
    zero: Array
    axis: int
    signed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        text = base64.b64encode(self.scale.astype("<f4").tobytes()).decode()
        return {"scale": text, "zero": [int(zero) for zero in self.zero], "axis": self.axis}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Ranges:
        """The inverse of `to_json`."""
        scale = np.frombuffer(base64.b64decode(values["scale"]), "<f4")
        return cls(scale, np.asarray(values["zero"], np.int64), int(values["axis"]))


@dataclass(frozen=True, eq=False)
class Part:
    """One layer.

    Args:
        layer: the weight's name without what quantizing added.
        op: operator that multiplies, or looks up.
        weight: name of the constant with codes, or of the float weight.
        given: name of the value that goes in, as the product reads it: codes where it has static ranges.
        given_codes: what these codes mean; None where a float goes in.
        padding: (before, after) zeros of every axis that are around the input before it is rounded; () for none.
        source: name of the float value that goes in; "" where there is none but codes.
        output: name of the float output, the bias added.
        end: the output, or the value behind it that is rounded in its place.
        handed: name of the codes that `end` is handed on as; "" where it is not rounded by itself.
        handed_codes: what these mean.
        kind: "integer", "weights" or "float", as in `parity.bounds.Arithmetic`.
        formats: of weight and input, in words.
        across: whether a product reads its weight as [out, in].
        beside: names of the other values that go into a recurrent node.
    """

    layer: str
    op: str
    weight: str
    given: str
    given_codes: Ranges | None
    padding: tuple[tuple[int, ...], ...]
    source: str
    output: str
    end: str
    handed: str
    handed_codes: Ranges | None
    kind: str
    formats: str
    across: bool = False
    beside: tuple[str, ...] = ()


def notes_of(model: ir.Model, name: str) -> dict[str, Any]:
    """What an exporter of narrowcast has noted in a model under this name; empty where it is no such model."""
    try:
        found = json.loads(model.metadata_props.get(name, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def find_parts(model: ir.Model) -> list[Part]:
    """The layers of the main graph, in its order; one weight with several uses gives several, marked by strokes."""
    names = {str(value.name) for value in all_values(model.graph)}
    reader = _Reader(notes_of(model, LAYERS), notes_of(model, RANGES), notes_of(model, TOKENS), names)
    parts: list[Part] = []
    taken: set[str] = set()
    for node in model.graph:
        part = reader.part(node, taken)
        if part is not None:
            taken.add(part.layer)
            parts.append(part)
    return parts


def constant_behind(value: Any) -> tuple[Any, list[ir.Node]]:
    """The initializer that a value is made of, and the nodes between; (None, []) where it is no constant."""
    through: list[ir.Node] = []
    while value is not None and value.producer() is not None and value.producer().op_type in _PASSED:
        through.append(value.producer())
        value = value.producer().inputs[0]
    if value is None or value.const_value is None or not value.is_initializer():
        return None, []
    return value, through


@dataclass
class _Reader:
    layers: dict[str, Any]
    ranges: dict[str, Any]
    tokens: dict[str, Any]
    names: set[str]

    def part(self, node: ir.Node, taken: set[str]) -> Part | None:
        """The layer that a node multiplies for; None for other nodes."""
        if node.op_type in (*RECURRENT, _INTEGER_RECURRENT):
            return _recurrent(node)
        if node.op_type not in _PRODUCTS:
            return None
        index, data = _PRODUCTS[node.op_type]
        weight, through = constant_behind(node.inputs[index])
        if weight is None or node.inputs[data] is None or len(weight.const_value.shape) < 2:
            return None
        if node.op_type == "Gather" and int(weight.const_value.shape[-1]) == 1:
            return None  # a scale or zero point of every row
        if str(weight.name).endswith(EPILOGUE):
            return None  # what zero points of rows add up to, and the bias
        name = _stem(str(weight.name))
        while name in taken:
            name += "'"
        noted = noted_product(self.tokens, str(weight.name), self.names)
        if noted is not None:
            return self._of_tokens(name, node, weight, through, noted)
        given, given_codes, padding, source = self._input(node.inputs[data], node.op_type)
        output = _output(node, weight)
        end, handed = _handed(output) if given_codes is not None else (output, None)
        kind = _kind(node, through, weight, coded=given_codes is not None)
        handed_codes = None if handed is None else self._meaning(handed)
        return Part(
            name, node.op_type, str(weight.name), str(given.name), given_codes, padding, source, str(output.name),
            str(end.name), "" if handed is None else str(handed.name), handed_codes, kind,
            self._formats(name, node, weight, through, given_codes),
            node.op_type == "Gemm" and bool(attribute(node, "transB", 0)),
        )  # fmt: skip

    def _of_tokens(self, name: str, node: ir.Node, weight: Any, through: list[ir.Node], noted: Any) -> Part:
        """A product that rounds every row of a float input for itself."""
        spec = self.layers.get(name, {}).get("spec") or _weight_format(node, weight, through)
        given, output = noted["given"], noted["output"]
        return Part(
            name, node.op_type, str(weight.name), given, None, (), given, output, output, "", None, "integer",
            f"{spec} x {noted['input']}",
        )  # fmt: skip

    def _input(self, value: ir.Value, op: str) -> tuple[ir.Value, Ranges | None, tuple[tuple[int, ...], ...], str]:
        maker = value.producer()
        if op == "Gather" or maker is None:
            return value, None, (), str(value.name)
        if maker.op_type == "DynamicQuantizeLinear":
            return maker.inputs[0], None, (), str(maker.inputs[0].name)
        coded = maker.inputs[0] if maker.op_type == "DequantizeLinear" else value
        meaning = self._meaning(coded)
        if meaning is None:
            return value, None, (), str(value.name)
        maker = coded.producer()
        if maker is None or maker.op_type != "QuantizeLinear":
            return coded, meaning, (), ""
        source = maker.inputs[0]
        padding = _padding(source.producer())
        if padding:
            source = source.producer().inputs[0]
        return coded, meaning, padding, str(source.name)

    def _meaning(self, coded: ir.Value) -> Ranges | None:
        """What the codes of a value mean; None where it has none, or they are not fixed."""
        if str(coded.name) in self.ranges:
            return Ranges.from_json(self.ranges[str(coded.name)])
        maker = coded.producer()
        if maker is None or maker.op_type != "QuantizeLinear":
            return None
        scale, zero = (None if value is None else value.const_value for value in maker.inputs[1:3])
        if scale is None or zero is None:
            return None
        axis, signed = int(attribute(maker, "axis", 1)), zero.dtype == ir.DataType.INT8
        return Ranges(scale.numpy().reshape(-1), zero.numpy().astype(np.int64).reshape(-1), axis, signed)

    def _formats(self, name: str, node: ir.Node, weight: Any, through: list[ir.Node], given: Ranges | None) -> str:
        """Formats in the words of specs; what only ONNX Runtime does is said so that it equals no module's."""
        noted = self.layers.get(name, {})
        text = noted.get("spec") or _weight_format(node, weight, through)
        if given is not None:
            text += " x " + (noted.get("input") or f"uint8/{'channel' if given.scale.size > 1 else 'tensor'}")
        elif node.op_type in ("MatMulInteger", "ConvInteger"):
            text += " x uint8, one range for the whole input"
        elif node.op_type == "MatMulNBits" and attribute(node, "accuracy_level", 0) == 4:
            text += " x int8, a range per block"
        return str(text)


def _recurrent(node: ir.Node) -> Part | None:
    """A recurrent node by its name, looked at where it is first read: at all states, or else at the last ones."""
    outputs = [value for value in node.outputs if value.name and (_readers(value) or value.is_graph_output())]
    if not outputs or node.inputs[0] is None:
        return None
    found = [constant_behind(value) for value in node.inputs[1:3]]
    weights = [_weight_format(node, weight, through) if weight is not None else "float32" for weight, through in found]
    formats, kind = ", ".join(sorted(set(weights))), "weights" if any(through for _, through in found) else "float"
    if node.op_type == _INTEGER_RECURRENT:
        formats, kind = f"{formats} x uint8, one range for the whole input and for each state", "integer"
    given, output = str(node.inputs[0].name), str(outputs[0].name)
    beside = [node.inputs[index] for index in _BESIDE if index < len(node.inputs)]
    fed = dict.fromkeys(str(value.name) for value in beside if value is not None and value.const_value is None)
    fed.pop(given, None)
    name = str(node.name).removesuffix("_quantized") or output
    return Part(
        name, node.op_type, "", given, None, (), given, output, output, "", None, kind, formats, beside=tuple(fed)
    )  # fmt: skip


def hidden_layers(model: ir.Model) -> int:
    """How many products and recurrent nodes are in subgraphs, where `find_parts` does not look."""
    main = {id(node) for node in model.graph}
    kinds = (*_PRODUCTS, *RECURRENT, _INTEGER_RECURRENT)
    return sum(node.op_type in kinds and id(node) not in main for node in model.graph.all_nodes())


def _padding(node: Any) -> tuple[tuple[int, ...], ...]:
    if node is None or node.op_type != "Pad" or node.inputs[1].const_value is None:
        return ()
    pads = [int(side) for side in node.inputs[1].const_value.numpy()]
    half = len(pads) // 2
    return tuple(zip(pads[:half], pads[half:], strict=True))


def _stem(name: str) -> str:
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _kind(node: ir.Node, through: list[ir.Node], weight: Any, *, coded: bool) -> str:
    if node.op_type in ("ConvInteger", "MatMulInteger") or coded:
        return "integer"
    if node.op_type == "Gather":
        return "integer" if weight.const_value.dtype != ir.DataType.FLOAT else "float"
    return "weights" if through or node.op_type == "MatMulNBits" else "float"


def _weight_format(node: ir.Node, weight: Any, through: list[ir.Node]) -> str:
    if node.op_type == "MatMulNBits":
        return f"int{attribute(node, 'bits', 4)}/group{attribute(node, 'block_size', 32)}"
    dtype = weight.const_value.dtype
    names = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
    if dtype in names:
        return names[dtype]
    scales = [step.inputs[1].const_value for step in through if step.op_type == "DequantizeLinear"]
    one = bool(scales) and scales[0] is not None and int(np.prod(scales[0].shape)) == 1
    return f"{dtype.name.lower()}/{'tensor' if one else 'channel'}"


def _readers(value: ir.Value) -> list[ir.Node]:
    return [node for node, _ in value.uses()]


def _output(node: ir.Node, weight: Any) -> ir.Value:
    """The output of a product with all that belongs to it."""
    value = node.outputs[0]
    if node.op_type == "Gather" and weight.const_value.dtype == ir.DataType.FLOAT:
        return value
    for op, needed in _BEHIND.get(node.op_type, ()):
        found = [reader for reader in _readers(value) if reader.op_type == op]
        if len(found) == 1 and len(_readers(value)) == 1 and (needed or _adds_constant(found[0], value)):
            value = found[0].outputs[0]
        elif needed:
            break
    return value


def _adds_constant(node: ir.Node, value: ir.Value) -> bool:
    """Whether the other operand is a bias: a constant, maybe of codes, or looked up with the same indices."""
    other = node.inputs[1 if node.inputs[0] is value else 0]
    maker = other.producer()
    return constant_behind(other)[0] is not None or (node.op_type == "Sub" and maker is not None)


def _handed(output: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The value that is rounded, and its codes, where a product hands on nothing else."""
    for value in (output, rectified(output)):
        readers = _readers(value)
        if len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and not value.is_graph_output():
            return value, readers[0].outputs[0]
    return output, None


def stored_codes(model: ir.Model, part: Part) -> Array | None:
    """The codes of a layer as a matrix [out, in * kernel]; None where they do not lie there as such."""
    value = model.graph.initializers.get(part.weight)
    if value is None or value.const_value is None or value.const_value.dtype == ir.DataType.FLOAT:
        return None
    array = np.array(value.const_value.numpy())  # the file's own is not writable, which torch warns of
    if array.dtype == np.uint8:  # the same integers for kernels that want them so
        array = (array.astype(np.int64) - 128).astype(np.int8)
    if part.op in ("Conv", "ConvInteger"):
        return array.reshape(array.shape[0], -1)
    if part.op not in ("Gemm", "MatMul", "MatMulInteger") or array.ndim != 2:
        return None
    return array if part.across else np.ascontiguousarray(array.T)


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs, constants and what nodes give, those of subgraphs left out."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
