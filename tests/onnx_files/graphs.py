"""Small ONNX graphs with fixed random weights, made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def constant(array: Any, name: str) -> Any:
    return numpy_helper.from_array(np.asarray(array), name)


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any], opset: int = 17) -> Any:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def residual_network() -> Any:
    """Conv, Relu, depthwise Conv, Add, Relu, pooling, Gemm: [batch, 3, 12, 12] -> [batch, 5]."""
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight", "stem.bias"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "depthwise.weight", "depthwise.bias"], ["c"], pads=[1] * 4, group=8),
        helper.make_node("Add", ["c", "b"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    constants = [
        constant(normal(8, 3, 3, 3, seed=1), "stem.weight"),
        constant(normal(8, seed=2), "stem.bias"),
        constant(normal(8, 1, 3, 3, seed=3), "depthwise.weight"),
        constant(normal(8, seed=4), "depthwise.bias"),
        constant(normal(5, 8, seed=5), "head.weight"),
        constant(normal(5, seed=6), "head.bias"),
    ]
    return model(nodes, [value("x", ["batch", 3, 12, 12])], [value("y", ["batch", 5])], constants)


def one(op: str, weight: Any, shape: list[Any], *, bias: Any = None, rank: int = 2, **attributes: Any) -> Any:
    """One node with a weight: x of `shape` -> y of `rank` axes."""
    inputs = ["x", "layer.weight"] + (["layer.bias"] if bias is not None and op != "MatMul" else [])
    inputs = ["layer.weight", "x"] if op == "Gather" else inputs
    last = "product" if op == "MatMul" and bias is not None else "y"
    nodes = [helper.make_node(op, inputs, [last], **attributes)]
    if last == "product":
        nodes.append(helper.make_node("Add", ["product", "layer.bias"], ["y"]))
    constants = [constant(weight, "layer.weight")] + ([constant(bias, "layer.bias")] if bias is not None else [])
    kind = TensorProto.INT64 if op == "Gather" else TensorProto.FLOAT
    return model(nodes, [value("x", shape, kind)], [value("y", [None] * rank)], constants)
