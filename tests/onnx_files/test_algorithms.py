"""Transforms, learned rounding and solving in order on ONNX graphs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import helper
from tests.onnx_files import graphs
from tests.onnx_files.test_twin import decomposed_norm

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.models.onnx_session import open_onnx_module

node = helper.make_node
W4 = {"weight": "int4/channel", "method": "rtn"}
IMAGES = torch.from_numpy(graphs.normal(64, 3, 12, 12, seed=30))
# 16 columns that follow 5 hidden ones: rounding errors of one can be made up for by others
TOKENS = torch.from_numpy(graphs.normal(60, 6, 5, seed=31) @ graphs.normal(5, 16, seed=32)) + 0.1 * torch.from_numpy(
    graphs.normal(60, 6, 16, seed=33)
)


def mobile(clip: bool = True) -> Any:
    """Expand, Clip at 6 or Relu, depthwise, Relu, project, with channels of very different size."""
    first = ["Clip", ["a", "low", "high"]] if clip else ["Relu", ["a"]]
    nodes = [
        node("Conv", ["x", "expand.weight", "expand.bias"], ["a"], "expand"), node(*first, ["b"]),
        node("Conv", ["b", "depthwise.weight", "depthwise.bias"], ["c"], "depthwise", pads=[1] * 4, group=8),
        node("Relu", ["c"], ["d"]), node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["e", "project.weight"], ["y"], "project"),
    ]  # fmt: skip
    size = np.geomspace(0.05, 3, 8, dtype=np.float32).reshape(-1, 1, 1, 1)
    constants = [
        graphs.constant(graphs.normal(8, 3, 1, 1, seed=1) * size / 3, "expand.weight"),
        graphs.constant(graphs.normal(8, seed=2) * size.reshape(-1) / 3, "expand.bias"),
        graphs.constant(graphs.normal(8, 1, 3, 3, seed=3) * size[::-1], "depthwise.weight"),
        graphs.constant(graphs.normal(8, seed=4), "depthwise.bias"),
        graphs.constant(graphs.normal(4, 8, 1, 1, seed=5), "project.weight"),
        graphs.constant(np.float32(0), "low"), graphs.constant(np.float32(6), "high"),
    ]  # fmt: skip
    return graphs.model(nodes, [graphs.value("x", ["n", 3, 12, 12])], [graphs.value("y", ["n", 4, 6, 6])],
                        constants if clip else constants[:-2])  # fmt: skip


def encoder() -> Any:
    """A product; then LayerNorm, two products with a Gelu between them, and a residual: one block."""
    nodes = [
        node("MatMul", ["x", "stem"], ["e"], "stem"),
        node("LayerNormalization", ["e", "norm.weight", "norm.bias"], ["h"], "norm"),
        node("MatMul", ["h", "up"], ["u"], "up"), node("Add", ["u", "up.bias"], ["v"]),
        node("Gelu", ["v"], ["g"]), node("MatMul", ["g", "down"], ["d"], "down"), node("Add", ["e", "d"], ["y"]),
    ]  # fmt: skip
    constants = [
        graphs.constant(np.eye(16, dtype=np.float32) + 0.1 * graphs.normal(16, 16, seed=13), "stem"),
        graphs.constant(np.exp(1.5 * graphs.normal(16, seed=6)), "norm.weight"),
        graphs.constant(graphs.normal(16, seed=7), "norm.bias"),
        graphs.constant(graphs.normal(16, 24, seed=8), "up"), graphs.constant(graphs.normal(24, seed=9), "up.bias"),
        graphs.constant(graphs.normal(24, 16, seed=10), "down"),
    ]  # fmt: skip
    return graphs.model(nodes, [graphs.value("x", ["n", "t", 16])], [graphs.value("y", ["n", "t", 16])], constants, 20)


def stacked() -> Any:
    """Gemm-like products with a Relu between them, some of whose channels never fall below zero."""
    nodes = [
        node("MatMul", ["x", "first"], ["a"], "first"), node("Add", ["a", "first.bias"], ["b"]),
        node("Relu", ["b"], ["c"]), node("MatMul", ["c", "second"], ["y"], "second"),
    ]  # fmt: skip
    bias = np.where(np.arange(24) % 3 == 0, 60, 0).astype(np.float32)
    constants = [
        graphs.constant(graphs.normal(16, 24, seed=11), "first"), graphs.constant(bias, "first.bias"),
        graphs.constant(graphs.normal(24, 8, seed=12), "second"),
    ]  # fmt: skip
    return graphs.model(nodes, [graphs.value("x", ["n", "t", 16])], [graphs.value("y", ["n", "t", 8])], constants)


def quantized(model: Any, data: Any, *, rule: Any = W4, **recipe: Any) -> Any:
    return nc.quantize(model, {"rule": [rule], **recipe}, data, progress=False)


def answers(model: Any, data: Any, **recipe: Any) -> float:
    """SQNR of the answers, in decibel."""
    result = quantized(model, data, **recipe)
    expected = float_answers(model, data)
    return sqnr_db(expected, result.model(data))


def float_answers(model: Any, data: Any) -> Any:
    from narrowcast.models.onnx_model import OnnxModel

    return OnnxModel(model).original(data)


CASES = {
    "equalize over a Clip": (mobile(), IMAGES, "equalize"),
    "equalize over a Relu": (mobile(clip=False), IMAGES, "equalize"),
    "absorb": (stacked(), TOKENS, "absorb"),
    "smoothquant of a convolution": (mobile(clip=False), IMAGES, "smoothquant"),
    "smoothquant of a LayerNorm": (encoder(), TOKENS, "smoothquant"),
    "awq of a LayerNorm": (encoder(), TOKENS, "awq"),
    "awq of a norm in single nodes": (decomposed_norm(), torch.from_numpy(graphs.normal(20, 5, 8, seed=40)), "awq"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_transform_keeps_the_function_and_says_by_how_much(name: str, tmp_path) -> None:
    model, data, transform = CASES[name]
    result = quantized(model, data, transforms=[transform])
    notes = " | ".join(result.report.notes)
    told = re.search(r"(\d+) nodes rewritten; ONNX Runtime's answers are unchanged to (\d+) dB", notes)
    assert told is not None and int(told[1]) > 1 and int(told[2]) > 90
    assert f"{transform}: float output unchanged to" in notes
    nc.save(result, tmp_path / "made.onnx")
    assert torch.equal(open_onnx_module(tmp_path / "made.onnx")(data), result.model(data))


@pytest.mark.parametrize("name", ["equalize over a Clip", "equalize over a Relu", "awq of a LayerNorm"])
def test_a_transform_makes_four_bits_better(name: str) -> None:
    model, data, transform = CASES[name]
    rule = {"weight": "int4/tensor" if transform == "equalize" else "int4/channel", "method": "rtn"}
    assert answers(model, data, rule=rule, transforms=[transform]) > answers(model, data, rule=rule) + 0.5


def test_what_a_transform_did_to_every_layer_is_in_the_report() -> None:
    report = quantized(mobile(), IMAGES, transforms=["equalize"]).report
    changes = {change.layer: change for change in report.changes}
    assert set(changes) == {"expand", "depthwise", "project"}
    assert changes["depthwise"].transform == "equalize" and changes["depthwise"].output_sqnr_after_db is not None


def test_pairs_are_named_by_nodes_or_layers_and_a_wrong_one_is_refused_by_these_names() -> None:
    pairs = [["expand", "depthwise"]]
    report = quantized(mobile(), IMAGES, transforms=[{"equalize": {"pairs": pairs}}]).report
    assert {change.layer for change in report.changes} == {"expand", "depthwise"}
    with pytest.raises(ModelError, match="'up' -> 'down' changes the function: its output goes through gelu"):
        quantized(encoder(), TOKENS, transforms=[{"smoothquant": {"pairs": [["up", "down"]]}}])
    with pytest.raises(RecipeError, match="'nothing' of its pairs matches no"):
        quantized(encoder(), TOKENS, transforms=[{"smoothquant": {"pairs": [["norm", "nothing"]]}}])


@pytest.mark.parametrize("method", ["gptq", "adaround", "autoround"])
@pytest.mark.parametrize("sequential", [True, False])
def test_solvers_lose_less_than_rounding_on_correlated_inputs(method: str, sequential: bool) -> None:
    rule = {"weight": "int4/channel", "method": method}
    result = quantized(encoder(), TOKENS, rule=rule, sequential=sequential)
    rows = [row for row in result.report.layers if row.outcome != "kept"]
    assert [row.method.partition(",")[0] for row in rows] == [method] * 3
    assert {row.outcome for row in rows} == {"quantized"}
    expected = float_answers(encoder(), TOKENS)
    assert sqnr_db(expected, result.model(TOKENS)) > answers(encoder(), TOKENS) + 1


def test_in_order_later_layers_see_what_earlier_ones_became() -> None:
    rule = {"weight": "int2/group16/asym", "method": "gptq"}
    scores = {s: answers(encoder(), TOKENS, rule=rule, sequential=s) for s in (True, False)}
    assert scores[True] != scores[False]
    assert answers(encoder(), TOKENS, rule=rule) == scores[True]


def test_learned_rounding_of_a_static_network_runs_in_integer_kernels() -> None:
    rule = {"weight": "int8/channel", "input": "uint8/tensor static:minmax", "method": "autoround"}
    result = quantized(mobile(), IMAGES, rule=rule, transforms=["equalize"])
    assert {row.kernel for row in result.report.layers} == {"QLinearConv"}
    assert all(row.method.startswith("autoround") and "bias corrected" in row.method for row in result.report.layers)
    assert sqnr_db(float_answers(mobile(), IMAGES), result.model(IMAGES)) > 30


def test_a_block_without_gradients_is_rounded_and_the_reason_told() -> None:
    nodes = [
        node("MatMul", ["x", "up"], ["u"], "up"), node("ThresholdedRelu", ["u"], ["v"], "bent", alpha=0.1),
        node("MatMul", ["v", "down"], ["d"], "down"), node("Add", ["x", "d"], ["y"]),
    ]  # fmt: skip
    constants = [graphs.constant(graphs.normal(16, 24), "up"), graphs.constant(graphs.normal(24, 16), "down")]
    model = graphs.model(nodes, [graphs.value("x", ["n", "t", 16])], [graphs.value("y", ["n", "t", 16])], constants)
    rows = quantized(model, TOKENS, rule={"weight": "int4/channel", "method": "autoround"}).report.layers
    assert [row.outcome for row in rows] == ["fell back", "quantized"]
    assert "bent (ThresholdedRelu), which only ONNX Runtime computes" in rows[0].reason
    assert "rtn instead of autoround" in rows[0].reason
    solved = quantized(model, TOKENS, rule={"weight": "int4/channel", "method": "adaround"}).report.layers
    assert all(row.outcome == "quantized" and row.method.startswith("adaround") for row in solved)


def test_data_that_can_be_read_once_is_enough_unless_blocks_are_asked_for() -> None:
    rule = {"weight": "int4/channel", "method": "gptq"}
    result = quantized(encoder(), (part for part in TOKENS.split(10)), rule=rule)
    assert all(row.method.startswith("gptq") for row in result.report.layers if row.outcome != "kept")
    assert any("can be read only once" in note for note in result.report.notes)
    with pytest.raises(DataError, match="read only once"):
        quantized(encoder(), (part for part in TOKENS.split(10)), rule=rule, sequential=True)


def test_the_corrected_bias_of_a_stored_weight_is_in_the_file() -> None:
    rule = {"weight": "int4/channel", "method": "rtn"}
    results = {on: quantized(mobile(), IMAGES, rule=rule, correct_bias=on) for on in (True, False)}
    assert "bias corrected" in results[True].report.layers[0].method
    expected = float_answers(mobile(), IMAGES)
    means = {on: (result.model(IMAGES) - expected).mean((0, 2, 3)).norm() for on, result in results.items()}
    assert means[True] < 0.5 * means[False]


def test_a_graph_that_torch_computes_otherwise_is_solved_from_one_pass_or_refused(monkeypatch) -> None:
    from narrowcast.models import onnx_ops

    monkeypatch.setitem(onnx_ops.OPS, "Gelu", lambda a: torch.relu)
    rule = {"weight": "int4/channel", "method": "gptq"}
    report = quantized(encoder(), TOKENS, rule=rule).report
    assert any("solved from one pass" in note and "does not give what ONNX Runtime" in note for note in report.notes)
    assert all(row.method.startswith("gptq") for row in report.layers if row.outcome != "kept")
    for options in ({"sequential": True}, {"transforms": ["smoothquant"]}):
        with pytest.raises(ModelError, match="does not give what ONNX Runtime gives"):
            quantized(encoder(), TOKENS, rule=rule, **options)
