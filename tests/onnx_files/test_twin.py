"""The torch twin of an ONNX graph: the same answers, the blocks, and what only ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import TensorProto, helper
from tests.onnx_files import graphs

from narrowcast.core import sqnr_db
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_twin import Twin, make_twin

node = helper.make_node


def twin_of(model: Any) -> tuple[OnnxModel, Twin]:
    adapter = OnnxModel(model)
    return adapter, make_twin(adapter.graph, adapter.uses())


def same(model: Any, *inputs: Any) -> float:
    adapter, twin = twin_of(model)
    given = [torch.from_numpy(np.asarray(x)) for x in inputs]
    with torch.no_grad():
        return sqnr_db(adapter.original(*given).double(), twin.module(*given).double())


def unary(nodes: list[Any], shape: list[Any], rank: int, constants: list[Any] = ()) -> Any:
    return graphs.model(nodes, [graphs.value("x", shape)], [graphs.value("y", [None] * rank)], list(constants), 18)


CASES = {
    "Conv with uneven padding": graphs.one("Conv", graphs.normal(4, 3, 3, 3), ["n", 3, 9, 9], rank=4,
                                           pads=[0, 1, 2, 1], strides=[2, 2]),
    "Conv that pads to the same size": graphs.one("Conv", graphs.normal(4, 3, 3, 2), ["n", 3, 9, 8], rank=4,
                                                  auto_pad="SAME_UPPER", strides=[2, 1]),
    "Conv of a sequence": graphs.one("Conv", graphs.normal(4, 3, 3), ["n", 3, 9], rank=3, bias=graphs.normal(4)),
    "ConvTranspose": graphs.one("ConvTranspose", graphs.normal(3, 4, 3, 3), ["n", 3, 5, 5], rank=4, strides=[2, 2],
                                pads=[1] * 4, output_padding=[1, 1], bias=graphs.normal(4)),
    "grouped ConvTranspose": graphs.one("ConvTranspose", graphs.normal(4, 2, 3, 3), ["n", 4, 5, 5], rank=4, group=2),
    "MatMul with a bias": graphs.one("MatMul", graphs.normal(6, 5), ["n", 3, 6], rank=3, bias=graphs.normal(5)),
    "Gemm with alpha": graphs.one("Gemm", graphs.normal(6, 5), ["n", 6], alpha=0.5, bias=graphs.normal(5)),
    "Gemm with a transposed weight": graphs.one("Gemm", graphs.normal(5, 6), ["n", 6], transB=1, bias=graphs.normal(5)),
    "shapes": unary(
        [node("Shape", ["x"], ["s"]), node("Slice", ["s", "one", "two"], ["side"]),
         node("Concat", ["minus", "side"], ["shape"], axis=0), node("Transpose", ["x"], ["t"], perm=[2, 0, 1]),
         node("Reshape", ["t", "shape"], ["r"]), node("Split", ["r"], ["a", "b"], axis=1, num_outputs=2),
         node("Slice", ["a", "two", "zero", "one", "minus"], ["c"]), node("Softmax", ["c"], ["y"], axis=0)],
        ["n", 4, 6], 2, [graphs.constant(np.array([v], np.int64), n)
                         for n, v in (("zero", 0), ("one", 1), ("two", 2), ("minus", -1))]),
    "pooling": unary(
        [node("MaxPool", ["x"], ["a"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
         node("AveragePool", ["a"], ["b"], kernel_shape=[2, 2], ceil_mode=1),
         node("AveragePool", ["b"], ["c"], kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
         node("GlobalAveragePool", ["c"], ["d"]), node("Flatten", ["d"], ["y"])], ["n", 3, 13, 13], 2),
    "an operator that torch has no row for": unary([node("ThresholdedRelu", ["x"], ["y"], alpha=0.3)], ["n", 5], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_twin_answers_what_onnx_runtime_answers(name: str) -> None:
    shape = [side.dim_value or 2 for side in CASES[name].graph.input[0].type.tensor_type.shape.dim]
    assert same(CASES[name], graphs.normal(*shape)) > 100


def test_lookups_count_from_the_end_and_masks_are_computed_once() -> None:
    nodes = [
        node("Gather", ["table", "ids"], ["e"]), node("Less", ["ids", "zero"], ["m"]), node("Cast", ["m"], ["f"], to=1),
        node("MatMul", ["e", "w"], ["h"]), node("Unsqueeze", ["f", "last"], ["u"]), node("Mul", ["h", "u"], ["g"]),
        node("MatMul", ["g", "v"], ["y"]),
    ]  # fmt: skip
    constants = [
        graphs.constant(graphs.normal(7, 4), "table"), graphs.constant(graphs.normal(4, 6), "w"),
        graphs.constant(graphs.normal(6, 3), "v"), graphs.constant(np.array(0), "zero"),
        graphs.constant(np.array([-1]), "last"),
    ]  # fmt: skip
    model = graphs.model(nodes, [graphs.value("ids", ["n", "t"], TensorProto.INT64)], [graphs.value("y", [None] * 3)],
                         constants)  # fmt: skip
    assert same(model, np.array([[0, -1, 6], [-7, 3, 2]])) > 100
    _, twin = twin_of(model)
    assert len(twin.module) == 3 and [step.name for step in twin.module.first] != []


def test_a_branch_is_computed_by_onnx_runtime_and_its_block_says_so() -> None:
    def branch(name: str, op: str) -> Any:
        return helper.make_graph([node(op, ["h"], [name])], name, [], [graphs.value(name, [None, None])])

    nodes = [
        node("MatMul", ["x", "w"], ["h"]), node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["c"]),
        node("If", ["c"], ["i"], then_branch=branch("a", "Relu"), else_branch=branch("b", "Neg")),
        node("MatMul", ["i", "v"], ["y"]),
    ]  # fmt: skip
    constants = [graphs.constant(graphs.normal(4, 6), "w"), graphs.constant(graphs.normal(6, 3), "v"),
                 graphs.constant(np.float32(0), "zero")]  # fmt: skip
    model = graphs.model(nodes, [graphs.value("x", ["n", 4])], [graphs.value("y", [None] * 2)], constants)
    x = np.abs(graphs.normal(3, 4))
    assert same(model, x) > 100 and same(model, -x) > 100
    _, twin = twin_of(model)
    assert [names for names in twin.opaque.values() if names] and "If" in str(twin.opaque)


def test_a_network_is_cut_where_one_value_goes_on() -> None:
    _, twin = twin_of(graphs.residual_network())
    assert [sorted(name for name, _ in part.named_children()) for part in twin.module] == [
        ["Conv_of_a"], ["Conv_of_c"], ["Gemm_of_y"],
    ]  # fmt: skip


def test_a_normalization_in_single_nodes_is_a_module_with_its_scale() -> None:
    model = decomposed_norm()
    _, twin = twin_of(model)
    assert "ChannelScaleNorm" in [type(made.module).__name__ for made in twin.made.values()]
    assert same(model, graphs.normal(3, 5, 8)) > 100


def decomposed_norm() -> Any:
    """LayerNorm written in nodes, between two products."""
    nodes = [
        node("MatMul", ["x", "w"], ["h"]), node("ReduceMean", ["h", "last"], ["m"]), node("Sub", ["h", "m"], ["d"]),
        node("Mul", ["d", "d"], ["q"]), node("ReduceMean", ["q", "last"], ["var"]), node("Add", ["var", "eps"], ["v"]),
        node("Sqrt", ["v"], ["root"]), node("Div", ["d", "root"], ["n"]), node("Mul", ["n", "gain"], ["g"]),
        node("Add", ["g", "shift"], ["z"]), node("MatMul", ["z", "u"], ["y"]),
    ]  # fmt: skip
    constants = [
        graphs.constant(graphs.normal(8, 8, seed=1), "w"), graphs.constant(graphs.normal(8, 6, seed=2), "u"),
        graphs.constant(np.array([-1]), "last"), graphs.constant(np.float32(1e-5), "eps"),
        graphs.constant(np.exp(graphs.normal(8, seed=3)), "gain"), graphs.constant(graphs.normal(8, seed=4), "shift"),
    ]  # fmt: skip
    return graphs.model(nodes, [graphs.value("x", ["n", 5, 8])], [graphs.value("y", [None] * 3)], constants, 18)


def test_blocks_that_come_in_turns_are_one_block() -> None:
    nodes, constants, x = [node("MatMul", ["x", "stem"], ["e"])], [graphs.constant(graphs.normal(8, 8), "stem")], "e"
    for layer in range(3):
        for name, side in (("wide", 12), ("long", 24)):
            out = f"{name}{layer}"
            nodes += [node("MatMul", [x, f"{out}.up"], [f"{out}.h"]), node("Relu", [f"{out}.h"], [f"{out}.r"])]
            nodes += [node("Tanh", [f"{out}.r"], [f"{out}.t"])] if name == "wide" else []
            nodes += [node("MatMul", [nodes[-1].output[0], f"{out}.down"], [f"{out}.d"])]
            nodes += [node("Add", [x, f"{out}.d"], [out])]
            constants += [graphs.constant(graphs.normal(8, side), f"{out}.up")]
            constants += [graphs.constant(graphs.normal(side, 8), f"{out}.down")]
            x = out
    nodes.append(node("MatMul", [x, "head"], ["y"]))
    constants.append(graphs.constant(graphs.normal(8, 3), "head"))
    model = graphs.model(nodes, [graphs.value("x", ["n", 8])], [graphs.value("y", ["n", 3])], constants)
    _, twin = twin_of(model)
    assert [len(dict(part.named_children())) for part in twin.module] == [1, 4, 4, 4, 1]
    assert same(model, graphs.normal(5, 8)) > 100


def test_a_recurrent_node_is_computed_by_onnx_runtime() -> None:
    nodes = [node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=6), node("Squeeze", ["h", "zero"], ["s"]),
             node("MatMul", ["s", "v"], ["y"])]  # fmt: skip
    constants = [
        graphs.constant(graphs.normal(1, 24, 4), "w"), graphs.constant(graphs.normal(1, 24, 6), "r"),
        graphs.constant(graphs.normal(6, 3), "v"), graphs.constant(np.array([0]), "zero"),
    ]  # fmt: skip
    model = graphs.model(nodes, [graphs.value("x", [5, "n", 4])], [graphs.value("y", [None] * 2)], constants)
    assert same(model, graphs.normal(5, 2, 4)) > 100


def test_nodes_may_have_any_name_and_messages_have_these_names() -> None:
    names = ["inputs", "a.b", "a:b", "forward"]
    nodes = [node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"], name) for i, name in enumerate(names)]
    constants = [graphs.constant(graphs.normal(4, 4, seed=i), f"w{i}") for i in range(4)]
    model = graphs.model(nodes, [graphs.value("x", ["n", 4])], [graphs.value("h4", ["n", 4])], constants)
    assert same(model, graphs.normal(3, 4)) > 100
    _, twin = twin_of(model)
    assert sorted(twin.paths) == sorted(names) and len(set(twin.paths.values())) == 4
    for name, path in twin.paths.items():
        assert (
            twin.readable(f"layer {path!r}: {path}, and layer1.{path}") == f"layer {name!r}: {name}, and layer1.{path}"
        )
