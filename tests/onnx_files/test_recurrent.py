"""LSTM and GRU nodes: the integer LSTM of ONNX Runtime, weights that are only stored, what stays float and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import TensorProto, helper, numpy_helper
from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.core import QuantSpec, sqnr_db
from narrowcast.methods import Rtn
from narrowcast.models.onnx_model import OnnxModel, Written
from narrowcast.models.onnx_verdict import kernels_of, optimized_graph
from narrowcast.nn import Activation

STEPS, BATCH, WIDTH, HIDDEN = 7, 3, 20, 16
DIRECTIONS = ("forward", "reverse", "bidirectional")


def recurrent(op: str = "LSTM", direction: str = "forward", weights: tuple[Any, Any] | None = None) -> Any:
    """A node with bias, lengths, initial states and, of an LSTM, peepholes: x [7, 3, 20] -> all of its outputs."""
    count, gates = (2 if direction == "bidirectional" else 1), (4 if op == "LSTM" else 3)
    first, second = weights or (
        graphs.normal(count, gates * HIDDEN, WIDTH, seed=1) * 0.3,
        graphs.normal(count, gates * HIDDEN, HIDDEN, seed=2) * 0.3,
    )
    constants = [
        graphs.constant(first, "W"),
        graphs.constant(second, "R"),
        graphs.constant(graphs.normal(count, 2 * gates * HIDDEN, seed=3) * 0.2, "B"),
        graphs.constant(np.array([7, 5, 3], np.int32), "lengths"),
        graphs.constant(graphs.normal(count, BATCH, HIDDEN, seed=4), "h"),
        graphs.constant(graphs.normal(count, BATCH, HIDDEN, seed=5), "c"),
        graphs.constant(graphs.normal(count, 3 * HIDDEN, seed=6) * 0.2, "P"),
    ]
    more, outputs = (["c", "P"], ["y", "last", "cell"]) if op == "LSTM" else ([], ["y", "last"])
    node = helper.make_node(op, ["x", "W", "R", "B", "lengths", "h", *more], outputs, name="rnn",
                            hidden_size=HIDDEN, direction=direction)  # fmt: skip
    shapes = [graphs.value(name, [None] * (4 if name == "y" else 3)) for name in outputs]
    used = constants if op == "LSTM" else constants[:5]
    return graphs.model([node], [graphs.value("x", [STEPS, BATCH, WIDTH])], shapes, used)


X = torch.from_numpy(graphs.normal(STEPS, BATCH, WIDTH, seed=9))


def weights_of(result: Any) -> list[Any]:
    return [row for row in result.report.layers if row.type != "Parameter"]


def quantized(model: Any, recipe: Any) -> Any:
    return nc.quantize(model, recipe, [X], progress=False)


@pytest.mark.parametrize("recipe", ["dynamic-int8", "static-int8"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_lstm_runs_in_the_integer_kernel_with_all_of_its_inputs(direction: str, recipe: str) -> None:
    model = recurrent(direction=direction)
    result = quantized(model, recipe)
    assert [row.kernel for row in weights_of(result)] == ["DynamicQuantizeLSTM"] * 2
    assert {row.outcome for row in weights_of(result)} == {"quantized"}
    for expected, got in zip(OnnxModel(model).original(X), result.model(X), strict=True):
        assert sqnr_db(expected, got) > 32


@pytest.mark.parametrize("weight", ["int8/channel/asym", "int4/channel", "int4/group16/asym"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_stored_weights_are_the_very_numbers_of_the_record(op: str, direction: str, weight: str) -> None:
    adapter = OnnxModel(recurrent(op, direction), blocked=True)
    arrays = []
    for layer in [row for row in adapter.layers() if row.type == op]:
        record = Rtn(range="absmax").quantize(adapter.weight(layer), QuantSpec.parse(weight))
        adapter.install(layer.sites[0].path, Written(record, Activation()))
        shape = adapter.use(layer.sites[0]).weight.const_value.shape
        arrays.append(record.dequantize().numpy().reshape([int(side) for side in shape]))
    adapter.finish()
    twin = OnnxModel(recurrent(op, direction, (arrays[0], arrays[1]))).original
    for expected, got in zip(twin(X), adapter.model(X), strict=True):
        assert float((expected - got).abs().max()) < 1e-5
    kernels = kernels_of(optimized_graph(adapter.graph), adapter.codes)
    assert {kernel.op for kernel in kernels.values()} == {op}
    assert all("DequantizeLinear" in kernel.through for kernel in kernels.values())


def test_weights_that_the_graph_arranges_from_constants_are_found() -> None:
    plain = recurrent()
    parts = {t.name: t for t in plain.graph.initializer}
    array = numpy_helper.to_array(parts["W"])[0]
    gates = np.split(array, 4)  # i, o, f, c; PyTorch has i, f, g, o
    constants = [t for t in plain.graph.initializer if t.name != "W"] + [
        graphs.constant(np.concatenate([gates[0], gates[2], gates[3], gates[1]]), "weight_ih"),
        *(graphs.constant(np.array([i * HIDDEN]), f"at{i}") for i in range(5)),
        graphs.constant(np.array([0]), "axis"),
    ]

    def piece(name: str, first: int) -> Any:
        return helper.make_node("Slice", ["weight_ih", f"at{first}", f"at{first + 1}", "axis"], [name])

    nodes = [
        *(piece(name, first) for name, first in (("gi", 0), ("gf", 1), ("gc", 2), ("go", 3))),
        helper.make_node("Concat", ["gi", "go", "gf", "gc"], ["joined"], axis=0),
        helper.make_node("Unsqueeze", ["joined", "axis"], ["W"]),
        *plain.graph.node,
    ]
    model = graphs.model(nodes, list(plain.graph.input), list(plain.graph.output), constants)
    result = quantized(model, "dynamic-int8")
    assert [row.layer for row in weights_of(result)] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert torch.equal(result.model(X)[0], quantized(plain, "dynamic-int8").model(X)[0])


def test_an_lstm_of_which_one_weight_stays_float_computes_in_float_and_says_so() -> None:
    rules = [{"layers": "*weight_hh*", "weight": "fp32"}, {"weight": "int8/channel", "input": "int8/token"}]
    result = quantized(recurrent(), {"rule": rules})
    first, second = weights_of(result)
    assert first.outcome == "fell back"
    assert "no integer kernel in ONNX Runtime" in first.reason
    assert second.spec == "fp32"
    assert sqnr_db(OnnxModel(recurrent()).original(X)[0], result.model(X)[0]) > 35


def test_a_gru_stays_float_where_integers_are_asked_for() -> None:
    result = quantized(recurrent("GRU"), "dynamic-int8")
    assert {row.outcome for row in weights_of(result)} == {"kept"}
    assert all("no integer kernel in ONNX Runtime" in row.reason for row in weights_of(result))
    assert torch.equal(result.model(X)[0], OnnxModel(recurrent("GRU")).original(X)[0])


def test_an_lstm_in_a_subgraph_runs_in_the_integer_kernel() -> None:
    inner = recurrent()
    branches = [
        helper.make_graph(list(inner.graph.node), name, [], [graphs.value("y", [None] * 4)], inner.graph.initializer)
        for name in ("yes", "no")
    ]
    node = helper.make_node("If", ["choose"], ["out"], then_branch=branches[0], else_branch=branches[1])
    inputs = [*inner.graph.input, graphs.value("choose", [], TensorProto.BOOL)]
    model = graphs.model([node], inputs, [graphs.value("out", [None] * 4)], [])
    batch = (X, torch.tensor(True))
    result = nc.quantize(model, "dynamic-int8", [batch], progress=False)
    assert {row.kernel for row in weights_of(result)} == {"DynamicQuantizeLSTM"}
    assert sqnr_db(OnnxModel(model).original(*batch), result.model(*batch)) > 32


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_few_bits_with_data_are_solved_for_the_inputs_of_a_recurrent_node(op: str) -> None:
    data = [torch.from_numpy(graphs.normal(7, 3, 20, seed=seed)) for seed in range(4)]
    result = nc.quantize(recurrent(op), {"rule": [{"weight": "int4/channel"}]}, data, progress=False)
    inputs, states = weights_of(result)
    assert inputs.method.startswith("gptq") and inputs.errors[-1].output_error < inputs.errors[0].output_error
    assert states.method.startswith("rtn") and "cannot be seen from outside" in states.reason
