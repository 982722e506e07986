"""Verifying ONNX files with recurrent nodes: each node alone on the reference's inputs, and in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import TensorProto, helper
from tests.onnx_files import graphs
from tests.onnx_files.test_recurrent import X, recurrent

import narrowcast as nc

STEPS, BATCH, WIDTH, HIDDEN = 6, 4, 20, 16


def stack(op: str = "LSTM", *, arranged: bool = False) -> Any:
    """Two recurrent nodes and a product: x [6, batch, 20] -> [batch, 5]; states and lengths are values of the graph.

    Args:
        op: of the nodes.
        arranged: whether the second node's weights are made of other constants at every run, as exporters do.
    """
    gates = 4 if op == "LSTM" else 3
    no_state = [
        helper.make_node("Shape", ["x"], ["batch"], start=1, end=2),
        helper.make_node("Concat", ["one", "batch", "hidden"], ["sides"], axis=0),
        helper.make_node("ConstantOfShape", ["sides"], ["zeros"]),
    ]
    states = ["zeros", "zeros"] if op == "LSTM" else ["zeros"]
    made = [helper.make_node("Unsqueeze", ["second", "first_axis"], ["W2"])] if arranged else []
    nodes = [
        *no_state, *made,
        helper.make_node(op, ["x", "W1", "R1", "", "lengths", *states], ["all"], name="rnn1", hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["all", "direction"], ["h1"]),
        helper.make_node(op, ["h1", "W2", "R2"], ["", "last"], name="rnn2", hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["last", "first_axis"], ["h2"]),
        helper.make_node("MatMul", ["h2", "head.weight"], ["y"]),
    ]  # fmt: skip
    second = graphs.normal(gates * HIDDEN, HIDDEN, seed=3) * 0.3
    constants = [
        graphs.constant(np.array([1]), "one"), graphs.constant(np.array([HIDDEN]), "hidden"),
        graphs.constant(np.array([0]), "first_axis"), graphs.constant(np.array([1]), "direction"),
        graphs.constant(graphs.normal(1, gates * HIDDEN, WIDTH, seed=1) * 0.3, "W1"),
        graphs.constant(graphs.normal(1, gates * HIDDEN, HIDDEN, seed=2) * 0.3, "R1"),
        graphs.constant(second, "second") if arranged else graphs.constant(second[None], "W2"),
        graphs.constant(graphs.normal(1, gates * HIDDEN, HIDDEN, seed=4) * 0.3, "R2"),
        graphs.constant(graphs.normal(HIDDEN, 5, seed=5), "head.weight"),
    ]  # fmt: skip
    inputs = [graphs.value("x", [STEPS, "batch", WIDTH]), graphs.value("lengths", ["batch"], TensorProto.INT32)]
    return graphs.model(nodes, inputs, [graphs.value("y", ["batch", 5])], constants)


DATA = [
    {"x": torch.from_numpy(graphs.normal(STEPS, BATCH, WIDTH, seed=9 + seed)), "lengths": torch.tensor([6, 5, 2, 6])}
    for seed in range(2)
]


def rows_of(parity: nc.Parity) -> dict[str, Any]:
    return {row.layer: row for row in parity.layers}


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_a_recurrent_node_equals_itself_alone_and_in_the_model(op: str) -> None:
    parity = nc.verify(stack(op), stack(op), DATA)
    assert parity.equal and list(rows_of(parity)) == ["rnn1", "rnn2", "head"]
    row = rows_of(parity)["rnn1"]
    assert row.alone.equal and row.in_model.equal
    assert row.bound == "equal: the same float kernels on the same weights"


@pytest.mark.parametrize("arranged", [True, False])
def test_a_float_file_and_its_integer_lstm_differ_in_format_and_are_held_against_a_tolerance(arranged: bool) -> None:
    model = stack(arranged=arranged)
    result = nc.quantize(model, "dynamic-int8", DATA, progress=False)
    parity = nc.verify(model, result, DATA)
    rows = rows_of(parity)
    assert not parity.ok and list(rows) == ["rnn1", "rnn2", "head"]
    assert rows["rnn2"].type == "LSTM, DynamicQuantizeLSTM"
    assert (rows["rnn1"].reference, rows["rnn1"].bound) == ("float32", "none: different formats")
    assert rows["rnn1"].artefact == "int8/channel x uint8, one range for the whole input and for each state"
    assert nc.verify(model, result, DATA, tolerance="30dB").ok
    again = nc.verify(result, result, DATA)
    assert again.equal and rows_of(again)["rnn1"].bound == "equal: the same integer arithmetic"


def test_weights_that_are_only_stored_are_compared_too() -> None:
    result = nc.quantize(stack("GRU"), "weight-int8", DATA, progress=False)
    rows = rows_of(nc.verify(stack("GRU"), result, DATA, tolerance="35dB"))
    assert rows["rnn1"].artefact == "int8/channel" and rows["rnn1"].type == "GRU"
    assert {row.verdict for row in rows.values()} == {"within bound"}


def test_one_changed_number_is_found_in_its_node_and_not_behind_it() -> None:
    faulty = stack()
    for tensor in faulty.graph.initializer:
        if tensor.name == "R1":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0, 40, 3] += 0.5
            tensor.CopyFrom(graphs.constant(array, "R1"))
    parity = nc.verify(stack(), faulty, DATA)
    assert parity.first_beyond == "rnn1" and not parity.ok
    assert rows_of(parity)["rnn2"].alone.equal and not rows_of(parity)["rnn2"].in_model.equal


@pytest.mark.parametrize("direction", ["reverse", "bidirectional"])
def test_nodes_with_all_inputs_are_compared_in_every_direction(direction: str) -> None:
    model = recurrent(direction=direction)
    result = nc.quantize(model, "dynamic-int8", [X], progress=False)
    parity = nc.verify(model, result, [X], tolerance="30dB")
    assert parity.ok and list(rows_of(parity)) == ["rnn"]


def test_products_in_subgraphs_are_named_as_not_compared(tmp_path: Path) -> None:
    branch = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["b"])], "branch", [],
                               [graphs.value("b", ["n", 6])], [graphs.constant(graphs.normal(8, 6), "w")])  # fmt: skip
    nodes = [helper.make_node("If", ["flag"], ["h"], then_branch=branch, else_branch=branch),
             helper.make_node("MatMul", ["h", "head.weight"], ["y"])]  # fmt: skip
    inputs = [graphs.value("x", ["n", 8]), graphs.value("flag", [], TensorProto.BOOL)]
    made = graphs.model(
        nodes, inputs, [graphs.value("y", ["n", 5])], [graphs.constant(graphs.normal(6, 5), "head.weight")]
    )
    parity = nc.verify(made, made, [{"x": torch.randn(3, 8), "flag": torch.tensor(True)}])
    assert any("2 products are inside of If or Loop" in note for note in parity.notes)
