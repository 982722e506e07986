"""Static values of ONNX files have a range per channel, written as one scale, wherever readers can take that in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import helper
from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.core import sqnr_db

CHANNELS, ONE = "uint8/channel static:minmax", "uint8/tensor static:minmax"
SPREAD = np.logspace(-1.2, 0.8, 16).astype(np.float32)[np.random.default_rng(0).permutation(16)]


def convolution(name: str, rows: int, columns: int, size: int, seed: int) -> list[Any]:
    """Weight and bias whose output channels differ in size."""
    spread = np.resize(SPREAD, rows)
    weight = graphs.normal(rows, columns, size, size, seed=seed) * spread[:, None, None, None] / size
    bias = graphs.normal(rows, seed=seed + 1) * spread
    return [graphs.constant(weight, f"{name}.weight"), graphs.constant(bias, f"{name}.bias")]


def node(op: str, *names: str, layer: str = "", **attributes: Any) -> Any:
    *inputs, output = names
    inputs += [f"{layer}.weight", f"{layer}.bias"] if layer else []
    return helper.make_node(op, inputs, [output], name=layer or output, **attributes)


def network(*, tail: tuple[Any, ...] = (), reads: str = "sum") -> Any:
    """Clip, depthwise, a residual sum, branches that are joined, an average: [batch, 3, 8, 8] -> [batch, 5]."""
    nodes = [
        node("Conv", "x", "a", layer="stem", pads=[1] * 4),
        node("Clip", "a", "zero", "six", "b"),
        node("Conv", "b", "c", layer="depthwise", group=16, pads=[1] * 4),
        node("Clip", "c", "zero", "six", "d"),
        node("Conv", "d", "e", layer="project"),
        node("Conv", "e", "f", layer="inner"),
        node("Relu", "f", "g"),
        node("Conv", "g", "h", layer="back"),
        node("Add", "e", "h", "sum"),
        *tail,
        node("Conv", reads, "left", layer="branch_1"),
        node("Conv", reads, "right", layer="branch_2", pads=[1] * 4),
        node("Concat", "left", "right", "both", axis=1),
        node("Relu", "both", "rectified"),
        node("GlobalAveragePool", "rectified", "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat", "y", layer="head", transB=1),
    ]
    constants = [
        *convolution("stem", 16, 3, 3, 1), *convolution("depthwise", 16, 1, 3, 3),
        *convolution("project", 12, 16, 1, 5),
        *convolution("inner", 16, 12, 1, 7), *convolution("back", 12, 16, 1, 9), *convolution("branch_1", 8, 12, 1, 11),
        *convolution("branch_2", 8, 12, 3, 13), graphs.constant(graphs.normal(5, 16, seed=15), "head.weight"),
        graphs.constant(graphs.normal(5, seed=16), "head.bias"), graphs.constant(np.float32(0), "zero"),
        graphs.constant(np.float32(6), "six"),
    ]  # fmt: skip
    return graphs.model(
        nodes, [graphs.value("x", ["batch", 3, 8, 8])], [graphs.value("y", ["batch", 5])], constants
    )  # fmt: skip


def images(seed: int) -> Tensor:
    return torch.from_numpy(graphs.normal(96, 3, 8, 8, seed=seed))


def recipe(given: str, **options: Any) -> dict[str, Any]:
    return {"rule": [{"weight": "int8/channel", "input": given}], **options}


def quantized(given: Any, model: Any = None) -> Any:
    return nc.quantize(network() if model is None else model, given, [images(30)], progress=False)


def answers(model: Any, x: Tensor) -> Tensor:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def inputs_of(result: Any) -> dict[str, Any]:
    return {row.layer.removesuffix(".weight"): row for row in result.report.layers}


def test_channels_of_different_size_lose_less_than_with_one_range_and_stay_in_integer_kernels() -> None:
    x = images(31)
    expected = answers(network(), x)
    found = {given: quantized(recipe(given)) for given in (CHANNELS, ONE)}
    decibel = {given: sqnr_db(expected, result.model(x)) for given, result in found.items()}
    assert decibel[CHANNELS] > decibel[ONE] + 2
    report = found[CHANNELS].report
    assert {row.kernel for row in report.layers} == {"QLinearConv", "QGemm"} and report.totals.integer_macs == 1.0


def test_the_report_says_which_inputs_have_a_range_per_channel_and_why_others_have_one() -> None:
    rows = inputs_of(quantized(recipe(CHANNELS)))
    assert rows["depthwise"].input.startswith("uint8/channel [0, ") and rows["depthwise"].input.endswith("balance 1")
    assert rows["stem"].input.startswith("uint8/tensor [")
    assert rows["stem"].reason == "one range for all channels of the input: no static convolution makes it"


def test_a_clip_goes_where_the_codes_of_every_channel_end_before_it(tmp_path: Path) -> None:
    kinds = {}
    for given in (CHANNELS, ONE):
        path = tmp_path / f"{given.partition(' ')[0].replace('/', '_')}.onnx"
        nc.save(quantized(recipe(given)), path)
        kinds[given] = [found.op_type for found in onnx.load(path).graph.node]
    assert kinds[ONE].count("Clip") == 2 and kinds[CHANNELS].count("Clip") == 0


def test_values_that_something_else_reads_have_one_range_and_the_reason_names_the_reader() -> None:
    squashed = network(tail=(node("Sigmoid", "sum", "squashed"),), reads="squashed")
    rows = inputs_of(quantized(recipe(CHANNELS), squashed))
    assert "Sigmoid makes it" in rows["branch_1"].reason
    assert "Sigmoid squashed reads it" in rows["inner"].reason  # its input is added to what the sigmoid reads
    assert rows["back"].input.startswith("uint8/channel")


def test_a_returned_value_keeps_its_own_units() -> None:
    model = network()
    model.graph.output.append(graphs.value("e", ["batch", 12, 8, 8]))
    result = quantized(recipe(CHANNELS), model)
    assert "the model returns it" in inputs_of(result)["inner"].reason


def test_a_layer_that_asks_for_one_range_gets_it_and_ties_the_value() -> None:
    rules = [{"weight": "int8/channel", "input": ONE, "layers": "inner*"}, *recipe(CHANNELS)["rule"]]
    rows = inputs_of(quantized({"rule": rules}))
    assert rows["inner"].input.startswith("uint8/tensor") and rows["inner"].reason == ""
    assert "inner is to have one range" in rows["branch_1"].reason  # reads a sum with the value of `inner`


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_solvers_that_work_block_after_block_see_the_ranges_per_channel(method: str) -> None:
    x = images(31)
    expected = answers(network(), x)
    given = {"rule": [{"weight": "int8/channel", "input": CHANNELS, "method": method}]}
    result = quantized(given)
    assert inputs_of(result)["depthwise"].input.startswith("uint8/channel")
    assert sqnr_db(expected, result.model(x)) > sqnr_db(expected, quantized(recipe(ONE)).model(x)) + 2


def test_a_network_whose_biases_are_corrected_is_corrected_in_the_same_units() -> None:
    x = images(31)
    expected = answers(network(), x)
    with_it, without = (quantized(recipe(CHANNELS, correct_bias=on)) for on in (True, False))
    assert sqnr_db(expected, with_it.model(x)) > sqnr_db(expected, without.model(x)) - 0.5
