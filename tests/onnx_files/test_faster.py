"""What is written so that ONNX Runtime takes its faster kernels: sums of codes, residual sums, means over images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import helper
from tests.onnx_files.graphs import constant, model, normal, value

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.models.onnx_verdict import optimized_graph

IMAGES = torch.from_numpy(normal(64, 3, 12, 12, seed=20))


def shortcut_network(fill: float = 0.0) -> Any:
    """A sum whose shortcut is sliced and padded, as ResNets of CIFAR have it, and a sum in front of the average."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "stem.weight"], ["a"], pads=[1] * 4), node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "down.weight"], ["c"], pads=[1] * 4, strides=[2, 2]),
        node("Slice", ["b", "starts", "ends", "axes", "steps"], ["cut"]),
        node("Pad", ["cut", "pads", "fill"], ["padded"]),
        node("Add", ["c", "padded"], ["d"]), node("Relu", ["d"], ["e"]),
        node("Conv", ["e", "last.weight"], ["f"], pads=[1] * 4),
        node("Add", ["f", "e"], ["g"]), node("Relu", ["g"], ["h"]),
        node("ReduceMean", ["h"], ["mean"], axes=[-1, -2], keepdims=0),
        node("Gemm", ["mean", "head.weight"], ["y"], transB=1),
    ]  # fmt: skip
    numbers = {"starts": [0, 0], "ends": [12, 12], "axes": [2, 3], "steps": [2, 2], "pads": [0, 2, 0, 0, 0, 2, 0, 0]}
    constants = [
        constant(normal(4, 3, 3, 3, seed=1), "stem.weight"), constant(normal(8, 4, 3, 3, seed=2) / 4, "down.weight"),
        constant(normal(8, 8, 3, 3, seed=3) / 6, "last.weight"), constant(normal(5, 8, seed=4), "head.weight"),
        constant(np.float32(fill), "fill"), *(constant(np.array(n, np.int64), name) for name, n in numbers.items()),
    ]  # fmt: skip
    return model(nodes, [value("x", ["batch", 3, 12, 12])], [value("y", ["batch", 5])], constants)


def operators(quantized: Any) -> Counter[str]:
    return Counter(node.op_type for node in optimized_graph(quantized.model.graph).node)


def test_a_shortcut_that_is_sliced_and_padded_stays_in_codes_and_so_does_the_sum_in_front_of_the_average() -> None:
    quantized = nc.quantize(shortcut_network(), "static-int8", IMAGES, progress=False)
    found = operators(quantized)
    assert found["QLinearAdd"] == 2 and not found["Add"] and not found["DequantizeLinear"], found
    assert found["QLinearGlobalAveragePool"] == 1 and found["QuantizeLinear"] == 1, found
    from narrowcast.models.onnx_model import OnnxModel

    unseen = torch.from_numpy(normal(32, 3, 12, 12, seed=21))
    assert sqnr_db(OnnxModel(shortcut_network()).original(unseen), quantized.model(unseen)) > 30


def test_a_shortcut_padded_with_another_number_than_0_stays_float_and_right() -> None:
    quantized = nc.quantize(shortcut_network(0.3), "static-int8", IMAGES, progress=False)
    assert operators(quantized)["Add"] == 1
    from narrowcast.models.onnx_model import OnnxModel

    assert sqnr_db(OnnxModel(shortcut_network(0.3)).original(IMAGES), quantized.model(IMAGES)) > 30


def normed_network() -> Any:
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "up.weight"], ["a"]), node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "down.weight"], ["c"]), node("Add", ["c", "x"], ["d"]),
        node("LayerNormalization", ["d", "norm.scale", "norm.shift"], ["e"], axis=-1),
        node("MatMul", ["e", "head.weight"], ["f"]), node("Add", ["f", "head.bias"], ["y"]),
    ]  # fmt: skip
    constants = [
        constant(normal(32, 64, seed=1) / 6, "up.weight"), constant(normal(64, 32, seed=2) / 8, "down.weight"),
        constant(normal(32, seed=3), "norm.scale"), constant(normal(32, seed=4), "norm.shift"),
        constant(normal(32, 8, seed=5) / 6, "head.weight"), constant(normal(8, seed=6), "head.bias"),
    ]  # fmt: skip
    return model(nodes, [value("x", ["batch", 10, 32])], [value("y", ["batch", 10, 8])], constants)


@pytest.mark.parametrize("recipe", ["dynamic-int8", "static-int8", "weight-int4"])
def test_no_slow_normalization_is_made_of_a_residual_sum(recipe: str) -> None:
    data = torch.from_numpy(normal(16, 10, 32, seed=7))
    quantized = nc.quantize(normed_network(), recipe, data, progress=False)
    found = operators(quantized)
    assert found["LayerNormalization"] == 1 and not found["SkipLayerNormalization"], found
    assert any("written as Sum" in note for note in quantized.report.notes)
