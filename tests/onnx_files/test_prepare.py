"""BatchNorms behind every kind of layer become part of it, and the function stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import helper
from tests.onnx_files import graphs

from narrowcast.core import sqnr_db
from narrowcast.models.onnx_model import OnnxModel

NORM = ["gamma", "beta", "mean", "variance"]


def with_norm(op: str, weight: Any, shape: list[Any], channels: int, *, bias: bool, **attributes: Any) -> Any:
    nodes = [
        helper.make_node(op, ["x", "weight", *(["bias"] if bias else [])], ["h"], **attributes),
        helper.make_node("BatchNormalization", ["h", *NORM], ["y"], epsilon=1e-3),
    ]
    constants = [graphs.constant(weight, "weight")]
    constants += [graphs.constant(graphs.normal(channels, seed=i), name) for i, name in enumerate(NORM[:3])]
    constants.append(graphs.constant(np.abs(graphs.normal(channels, seed=8)) + 0.1, "variance"))
    constants += [graphs.constant(graphs.normal(channels, seed=9), "bias")] if bias else []
    return graphs.model(nodes, [graphs.value("x", shape)], [graphs.value("y", [None] * len(shape))], constants)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("op", "weight", "shape", "attributes"),
    [("Conv", (6, 4, 3, 3), (2, 4, 9, 9), {}), ("Conv", (6, 2, 3), (2, 4, 9), {"group": 2}),
     ("ConvTranspose", (4, 6, 3, 3), (2, 4, 5, 5), {"strides": [2, 2]}), ("Gemm", (4, 6), (5, 4), {}),
     ("Gemm", (6, 4), (5, 4), {"transB": 1})],
)  # fmt: skip
def test_a_norm_behind_a_layer_is_folded(
    op: str, weight: tuple[int, ...], shape: tuple[int, ...], attributes: Any, bias: bool
) -> None:
    model = with_norm(op, graphs.normal(*weight, seed=5), ["n", *shape[1:]], 6, bias=bias, **attributes)
    adapter = OnnxModel(model)
    assert [node.op_type for node in adapter.graph.graph] == [op]
    x = torch.from_numpy(graphs.normal(*shape, seed=6))
    assert sqnr_db(adapter.original(x), adapter.model(x)) > 100


@pytest.mark.parametrize(("op", "weight", "attributes"), [("ConvTranspose", (4, 3, 3, 3), {"group": 2}),
                                                          ("Gemm", (4, 6), {"alpha": 0.5})])  # fmt: skip
def test_a_norm_behind_what_cannot_take_it_stays_and_is_told(op: str, weight: Any, attributes: Any) -> None:
    shape = ["n", 4, 5, 5] if op == "ConvTranspose" else ["n", 4]
    adapter = OnnxModel(with_norm(op, graphs.normal(*weight), shape, 6, bias=False, **attributes))
    assert [node.op_type for node in adapter.graph.graph] == [op, "BatchNormalization"]
    assert any("1 BatchNorms stay" in note for note in adapter.notes)
