"""Forms of graphs that exporters, old and new, write: read, quantized, and run with the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.core import sqnr_db

helper = onnx.helper
X = graphs.normal(12, 16, seed=3)


def product(nodes: list[Any], constants: list[Any], **options: Any) -> Any:
    """A graph from x [n, 16] to y of two axes."""
    return graphs.model(nodes, [graphs.value("x", ["n", 16])], [graphs.value("y", ["n", None])], constants, **options)


def run(model: Any, **feeds: Any) -> Any:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feeds or {"x": X})[0])


def quantized(model: Any, recipe: Any = "weight-int8", data: Any = (X,), **feeds: Any) -> tuple[Any, float]:
    """The result, and how near its answer is to the float model's, in decibel."""
    result = nc.quantize(model, recipe, list(data), progress=False)
    given = {name: torch.from_numpy(np.asarray(array)) for name, array in (feeds or {"x": X}).items()}
    return result, sqnr_db(run(model, **feeds), result.model(**given))


def outcomes(result: Any) -> dict[str, str]:
    return {row.layer: row.outcome for row in result.report.layers}


@pytest.mark.parametrize("recipe", ["weight-int8", "weight-int4", "dynamic-int8", "static-int8", "fp16"])
@pytest.mark.parametrize("opset", [7, 9, 11, 12])
def test_an_old_opset_is_converted_and_the_function_checked(recipe: str, opset: int) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Squeeze", ["p"], ["s"], axes=[2, 3]),  # axes became an input in opset 13
        helper.make_node("Gemm", ["s", "b.weight", "b.bias"], ["y"], transB=1),
    ]
    shapes = {"a.weight": (32, 3, 3, 3), "b.weight": (5, 32), "b.bias": (5,)}
    constants = [graphs.constant(graphs.normal(*shape), name) for name, shape in shapes.items()]
    model = graphs.model(nodes, [graphs.value("x", ["n", 3, 8, 8])], [graphs.value("y", ["n", 5])], constants, opset)
    images = graphs.normal(6, 3, 8, 8)
    result, near = quantized(model, recipe, [images], x=images)
    assert near > (12 if recipe == "weight-int4" else 25)
    (note,) = [note for note in result.report.notes if f"opset {opset} was converted" in note]
    assert "on the first batch its answer is that of the original" in note
    assert set(outcomes(result).values()) <= {"quantized", "fell back"}
    unchecked = nc.quantize(model, "weight-int8", progress=False)
    assert any("not checked on data" in note for note in unchecked.report.notes)


def test_a_conversion_that_changes_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from narrowcast.models import onnx_scribe

    original = onnx_scribe.convert_version

    def wrong(proto: Any, target: int) -> Any:
        converted = original(proto, target)
        (node,) = [node for node in converted.graph.node if node.op_type == "Relu"]
        node.op_type = "Sigmoid"
        return converted

    monkeypatch.setattr(onnx_scribe, "convert_version", wrong)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    model = product(nodes, [graphs.constant(graphs.normal(16, 4), "w")], opset=11)
    with pytest.raises(nc.ModelError, match=r"opset 11 to 13 changed .*dB.*newer opset"):
        nc.quantize(model, "weight-int8", [X], progress=False)


@pytest.mark.parametrize("recipe", ["weight-int8", "dynamic-int8", "static-int8"])
def test_shared_transposed_and_repeated_initializers_are_quantized(recipe: str) -> None:
    weight = graphs.constant(graphs.normal(16, 16) / 4, "shared.weight")
    nodes = [
        helper.make_node("MatMul", ["x", "shared.weight"], ["a"]),
        helper.make_node("MatMul", ["a", "shared.weight"], ["b"]),  # two nodes read one constant
        helper.make_node("Transpose", ["turned.weight"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["b", "t"], ["y"]),
    ]
    result, near = quantized(product(nodes, [weight, graphs.constant(graphs.normal(5, 16), "turned.weight")]), recipe)
    assert outcomes(result) == {"shared": "quantized", "turned": "quantized"} and near > 25


@pytest.mark.parametrize("recipe", ["weight-int8", "static-int8"])
def test_weights_in_constant_nodes_and_behind_identities_are_found(recipe: str) -> None:
    nodes = [
        helper.make_node("Constant", [], ["layer.weight"], value=graphs.constant(graphs.normal(16, 8), "value")),
        helper.make_node("Identity", ["layer.weight"], ["same"]),
        helper.make_node("MatMul", ["x", "same"], ["y"]),
    ]
    result, near = quantized(product(nodes, []), recipe)
    assert list(outcomes(result).values()) == ["quantized"] and near > 25


def test_weights_that_are_inputs_in_an_old_file_are_constants() -> None:
    nodes = [helper.make_node("Gemm", ["x", "layer.weight", "layer.bias"], ["y"])]
    constants = [graphs.constant(graphs.normal(16, 4), "layer.weight"), graphs.constant(graphs.normal(4), "layer.bias")]
    model = product(nodes, constants)
    model.graph.input.extend([graphs.value("layer.weight", [16, 4]), graphs.value("layer.bias", [4])])
    model.ir_version = 3  # which knows no other way
    result, near = quantized(model)
    assert outcomes(result) == {"layer": "quantized"} and near > 25
    assert any("2 constants were inputs of the graph as well" in note for note in result.report.notes)
    assert [value.name for value in result.model.graph.graph.inputs] == ["x"]
    model.ir_version = 8
    del model.graph.input[-1]  # one of two: on purpose
    result, _ = quantized(model)
    assert outcomes(result) == {"layer": "kept"} and "a caller may pass another" in result.report.layers[0].reason


def with_if(inside: list[Any]) -> Any:
    """x times one of two weights, and behind it `inside`."""
    sides = [
        helper.make_graph([helper.make_node("MatMul", ["x", f"{side}.weight"], [f"{side}.out"])], side, [],
                          [graphs.value(f"{side}.out", ["n", 8])],
                          [graphs.constant(graphs.normal(16, 8), f"{side}.weight")])
        for side in ("then", "else")
    ]  # fmt: skip
    nodes = [helper.make_node("If", ["flag"], ["chosen"], then_branch=sides[0], else_branch=sides[1]), *inside]
    inputs = [graphs.value("x", ["n", 16]), graphs.value("flag", [], onnx.TensorProto.BOOL)]
    return graphs.model(
        nodes, inputs, [graphs.value("y", ["n", None])], [graphs.constant(graphs.normal(8, 4), "last.weight")]
    )


@pytest.mark.parametrize("recipe", ["weight-int8", "weight-int4", "dynamic-int8", "static-int8", "fp16"])
def test_both_sides_of_an_if_are_quantized_and_run(recipe: str) -> None:
    model = with_if([helper.make_node("MatMul", ["chosen", "last.weight"], ["y"])])
    for flag in (True, False):
        feeds = {"x": X, "flag": np.array(flag)}
        result, near = quantized(model, recipe, [feeds], **feeds)
        assert near > (10 if recipe == "weight-int4" else 22), (flag, near)
    assert set(outcomes(result).values()) <= {"quantized", "fell back"}


def test_the_body_of_a_loop_is_quantized_and_runs() -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["state", "body.weight"], ["next"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [graphs.value("i", [], onnx.TensorProto.INT64), graphs.value("go", [], onnx.TensorProto.BOOL),
         graphs.value("state", ["n", 16])],
        [graphs.value("on", [], onnx.TensorProto.BOOL), graphs.value("next", ["n", 16])],
        [graphs.constant(graphs.normal(16, 16) / 4, "body.weight")],
    )  # fmt: skip
    constants = [graphs.constant(np.array(3), "trips"), graphs.constant(np.array(True), "yes")]
    model = product([helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)], constants)
    result, near = quantized(model)
    assert outcomes(result) == {"body": "quantized"} and near > 25


def test_an_operator_that_nobody_knows_stays_as_it_is(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "layer.weight"], ["m"]),
        helper.make_node("Wonder", ["m"], ["y"], domain="com.example", strength=3),
    ]
    graph = helper.make_graph(nodes, "g", [graphs.value("x", ["n", 16])], [graphs.value("y", ["n", 4])],
                              [graphs.constant(graphs.normal(16, 4), "layer.weight")])  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    assert [row.layer.name for row in nc.plan(model, "weight-int8").layers] == ["layer"]
    result = nc.quantize(model, "weight-int8", progress=False)
    nc.save(result, tmp_path / "small.onnx")
    (node,) = [node for node in onnx.load(tmp_path / "small.onnx").graph.node if node.op_type == "Wonder"]
    assert node.domain == "com.example" and node.attribute[0].i == 3
    assert any("Wonder" in note and "not checked" in note for note in result.report.notes)
    with pytest.raises(nc.ModelError, match="Wonder"):
        nc.quantize(model, "static-int8", [X], progress=False)


@pytest.mark.parametrize("recipe", ["weight-int8", "weight-int4", "static-int8"])
def test_transposed_convolutions_keep_every_attribute(recipe: str) -> None:
    node = helper.make_node("ConvTranspose", ["x", "up.weight", "up.bias"], ["y"], strides=[2, 2],
                            output_padding=[1, 1], pads=[1, 1, 1, 1])  # fmt: skip
    constants = [graphs.constant(graphs.normal(32, 8, 3, 3), "up.weight"), graphs.constant(graphs.normal(8), "up.bias")]
    model = graphs.model(
        [node], [graphs.value("x", ["n", 32, "h", "w"])], [graphs.value("y", ["n", 8, "a", "b"])], constants
    )
    images = graphs.normal(2, 32, 5, 7)
    result, near = quantized(model, recipe, [images], x=images)
    assert near > (12 if recipe == "weight-int4" else 25)
    assert result.report.layers[0].type == "ConvTranspose2d"


@pytest.mark.parametrize("weight", ["int4/channel/asym", "int4/group16/asym"])
def test_solved_kernels_of_transposed_convolutions_are_not_turned_round(weight: str) -> None:
    node = helper.make_node("ConvTranspose", ["x", "up.weight"], ["y"], strides=[2, 2])
    model = graphs.model(
        [node], [graphs.value("x", ["n", 32, "h", "w"])], [graphs.value("y", ["n", 8, "a", "b"])],
        [graphs.constant(graphs.normal(32, 8, 3, 3), "up.weight")],
    )  # fmt: skip
    images = graphs.normal(16, 32, 5, 7)
    _, near = quantized(model, {"rule": [{"weight": weight, "method": "gptq"}]}, [images], x=images)
    assert near > 15


def test_sides_without_a_number_stay_without_one() -> None:
    conv = helper.make_node("Conv", ["x", "c.weight"], ["y"], pads=[1] * 4)
    model = graphs.model([conv], [graphs.value("x", ["n", 3, "h", "w"])], [graphs.value("y", ["n", 8, "h", "w"])],
                         [graphs.constant(graphs.normal(8, 3, 3, 3), "c.weight")])  # fmt: skip
    result = nc.quantize(model, "static-int8", [graphs.normal(4, 3, 8, 8), graphs.normal(2, 3, 6, 10)], progress=False)
    assert result.model(torch.randn(5, 3, 9, 7)).shape == (5, 8, 9, 7)
