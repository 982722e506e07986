"""Good ONNX models and what can be done to them: the mutations of `benchmarks.onnx_fuzz`."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

_SIDES = (0, -1, 1, 3, 2**31, 2**40, 2**62, -(2**63))
Mutation = Callable[[Any, random.Random], None]


def seeds() -> list[Any]:
    """Good models: convolutions with an If, products with a Loop and old inputs, a lookup; all under 10 kB."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(chance.standard_normal(shape).astype(np.float32), name)

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def made(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any]) -> Any:
        graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        return model

    network = made(
        [
            helper.make_node("Pad", ["x", "pads"], ["padded"]),
            helper.make_node("Conv", ["padded", "a.weight", "a.bias"], ["a"], kernel_shape=[3, 3]),
            helper.make_node("BatchNormalization", ["a", "gamma", "beta", "mean", "variance"], ["normed"]),
            helper.make_node("Relu", ["normed"], ["r"]),
            helper.make_node("ConvTranspose", ["r", "t.weight"], ["t"], strides=[2, 2]),
            helper.make_node("GlobalAveragePool", ["t"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], transB=1),
        ],
        [value("x", ["n", 3, 8, 8])], [value("y", ["n", 5])],
        [numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads"), constant("a.weight", 4, 3, 3, 3),
         constant("a.bias", 4), constant("gamma", 4), constant("beta", 4), constant("mean", 4),
         numpy_helper.from_array(np.ones(4, np.float32), "variance"), constant("t.weight", 4, 6, 2, 2),
         constant("head.weight", 5, 6), constant("head.bias", 5)],
    )  # fmt: skip
    branches = [
        helper.make_graph([helper.make_node("MatMul", ["h", f"{side}.weight"], [f"{side}.out"])], side, [],
                          [value(f"{side}.out", ["n", 6])], [constant(f"{side}.weight", 8, 6)])
        for side in ("then", "else")
    ]  # fmt: skip
    choosing = made(
        [
            helper.make_node("Gather", ["table", "ids"], ["found"]),
            helper.make_node("Transpose", ["m.weight"], ["m.turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["found", "m.turned"], ["h"]),
            helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1]),
        ],
        [value("ids", ["n"], TensorProto.INT64), value("flag", [], TensorProto.BOOL)], [value("y", ["n", 6])],
        [constant("table", 20, 8), constant("m.weight", 8, 8)],
    )  # fmt: skip
    return [network, choosing]


def _tensor(model: Any, chance: random.Random) -> Any:
    return chance.choice(model.graph.initializer)


def _node(model: Any, chance: random.Random) -> Any:
    return chance.choice(model.graph.node)


def names_swapped(model: Any, chance: random.Random) -> None:
    """Two nodes read each other's inputs."""
    one, other = _node(model, chance), _node(model, chance)
    if one.input and other.input:
        one.input[0], other.input[0] = other.input[0], one.input[0]


def edge_back(model: Any, chance: random.Random) -> None:
    """A node reads what comes after it."""
    node = _node(model, chance)
    if node.input:
        node.input[chance.randrange(len(node.input))] = chance.choice([*model.graph.node[-1].output, ""])


def name_repeated(model: Any, chance: random.Random) -> None:
    """Two values, or two constants, of one name."""
    if chance.random() < 0.5:
        _node(model, chance).output[0] = _node(model, chance).output[0]
    else:
        _tensor(model, chance).name = _tensor(model, chance).name


def sides_changed(model: Any, chance: random.Random) -> None:
    """A constant of another declared shape."""
    tensor = _tensor(model, chance)
    if tensor.dims and chance.random() < 0.7:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(_SIDES)
    else:
        tensor.dims.extend([chance.choice(_SIDES)])


def input_sides_changed(model: Any, chance: random.Random) -> None:
    """A graph input of another declared shape."""
    shape = chance.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape
    if shape.dim:
        chance.choice(shape.dim).dim_value = chance.choice(_SIDES)


def type_changed(model: Any, chance: random.Random) -> None:
    """A constant or input of another type."""
    if chance.random() < 0.6:
        _tensor(model, chance).data_type = chance.randrange(-1, 30)
    else:
        chance.choice(model.graph.input).type.tensor_type.elem_type = chance.randrange(0, 30)


def operator_changed(model: Any, chance: random.Random) -> None:
    """Another operator or domain."""
    node = _node(model, chance)
    node.op_type = chance.choice(
        ["Conv", "Gemm", "MatMul", "Loop", "Nonsense", "", "Gather", "LSTM", "Constant", "Tile"]
    )
    node.domain = chance.choice(["", "", "com.example", "com.microsoft"])


def attribute_changed(model: Any, chance: random.Random) -> None:
    """An attribute with another number, or of another kind."""
    import onnx

    node = _node(model, chance)
    name = chance.choice(["kernel_shape", "strides", "pads", "group", "transB", "axis", "dilations", "perm", "alpha"])
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    number = chance.choice(_SIDES)
    given: Any = chance.choice([number, [number], [number] * 4, 0.5, "text", b"\xff\xfe"])
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, given)])


def data_elsewhere(model: Any, chance: random.Random) -> None:
    """A weight in another file: outside, behind a link, at a huge place, or where it should be."""
    tensor = _tensor(model, chance)
    location = chance.choice(
        ["weights.bin", "../secret.bin", "/etc/passwd", "link.bin", "folder/../../secret.bin", "missing.bin", "", ".",
         "hard.bin", "folder", "model.onnx", "weights.bin\0x"]
    )  # fmt: skip
    tensor.data_location = 1
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    number = lambda: str(chance.choice([0, 4, 8, 100, 5000, -1, 2**40, 2**63, "x", ""]))  # noqa: E731
    entries = {"location": location} | {key: number() for key in ("offset", "length") if chance.random() < 0.5}
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)


def graph_inside_itself(model: Any, chance: random.Random) -> None:
    """Graphs in graphs in graphs."""
    import onnx

    node = _node(model, chance)
    for _ in range(chance.choice([1, 30])):
        inner = onnx.GraphProto()
        inner.node.add().CopyFrom(node)
        node = onnx.NodeProto(op_type=chance.choice(["If", "Loop"]), output=["inner"])
        node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
    model.graph.node.add().CopyFrom(node)


def opset_changed(model: Any, chance: random.Random) -> None:
    """Another version."""
    model.opset_import[0].version = chance.choice([-1, 0, 1, 6, 9, 11, 12, 21, 99, 2**40])
    model.ir_version = chance.choice([0, 3, 8, 10, 2**40])


def pieces_lost(model: Any, chance: random.Random) -> None:
    """A node, constant, input or output less."""
    field = chance.choice([model.graph.node, model.graph.initializer, model.graph.input, model.graph.output])
    if field:
        del field[chance.randrange(len(field))]


FIELDS: tuple[Mutation, ...] = (
    names_swapped, edge_back, name_repeated, sides_changed, input_sides_changed, type_changed, operator_changed,
    attribute_changed, data_elsewhere, data_elsewhere, graph_inside_itself, opset_changed, pieces_lost,
)  # fmt: skip


def mutated(good: Any, chance: random.Random) -> tuple[bytes, str]:
    """The bytes of a mutated model, and the kind of the mutation."""
    kind = chance.choice(("bytes", "cut", "splice", "fields", "fields", "fields"))
    content = bytearray(good.SerializeToString())
    if kind == "fields":
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(good)
        chosen = [chance.choice(FIELDS) for _ in range(chance.choice((1, 1, 2, 4)))]
        with suppress(IndexError, ValueError):  # an earlier one took what this one wants
            for mutation in chosen:
                mutation(model, chance)
        return model.SerializeToString(), chosen[0].__name__
    place = chance.randrange(len(content))
    if kind == "bytes":
        for _ in range(chance.choice((1, 3, 20))):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif kind == "cut":
        del content[place : place + chance.choice((1, 20, len(content)))]
    else:
        source = chance.randrange(len(content))
        content[place:place] = content[source : source + chance.choice((1, 30, 300))]
    return bytes(content), kind
