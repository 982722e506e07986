"""The QOperator form: the same codes as the QDQ form in ONNX Runtime, with reasons for what stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

import torch
from onnx import TensorProto, helper
from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.errors import FormatError
from narrowcast.export.artefact import write_artefact


def run(file: Path, x: Any) -> Any:
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def rewritten(model: Any, folder: Path) -> tuple[Counter[str], list[str]]:
    """Operators of the QOperator form of a model, which must be valid and answer as before; and the notes."""
    onnx.save(model, folder / "qdq.onnx")
    made = write_artefact(folder / "qdq.onnx", folder / "qoperator.onnx", form="qoperator")
    written = onnx.load(made.path)
    onnx.checker.check_model(written)
    shape = [side.dim_value or 4 for side in model.graph.input[0].type.tensor_type.shape.dim]
    x = graphs.normal(*shape, seed=9)
    np.testing.assert_array_equal(run(folder / "qdq.onnx", x), run(made.path, x))
    return Counter(node.op_type for node in written.graph.node), made.notes


def quantized(model: Any, folder: Path, shape: tuple[int, ...], recipe: str = "static-int8") -> Any:
    onnx.save(model, folder / "float.onnx")
    result = nc.quantize(str(folder / "float.onnx"), recipe, [torch.from_numpy(graphs.normal(*shape))], progress=False)
    nc.save(result, folder / "small.onnx")
    return onnx.load(folder / "small.onnx")


def test_a_network_in_integers_has_one_operator_per_step(tmp_path: Path) -> None:
    found, notes = rewritten(quantized(graphs.residual_network(), tmp_path, (32, 3, 12, 12)), tmp_path)
    assert found["QLinearConv"] == 2 and found["QGemm"] == 1 and found["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "Gemm", "GlobalAveragePool"} & set(found)
    assert all("Add" in note for note in notes)


@pytest.mark.parametrize(
    ("bias", "rank", "op"), [(True, 2, "QGemm"), (False, 2, "MatMulIntegerToFloat"), (True, 3, "MatMulIntegerToFloat")]
)
def test_products_with_float_outputs_need_no_codes_behind(tmp_path: Path, bias: bool, rank: int, op: str) -> None:
    added = graphs.normal(6, seed=2) if bias else None
    shape = ["batch", 8] if rank == 2 else ["batch", 5, 8]
    model = graphs.one("MatMul", graphs.normal(8, 6), shape, bias=added, rank=rank)
    found, notes = rewritten(quantized(model, tmp_path, (32, 8) if rank == 2 else (32, 5, 8)), tmp_path)
    assert found[op] == 1 and "MatMul" not in found and not notes


def around(op: str, *, scale: float = 0.1, out_zero: int = 0, out_scale: float = 0.2, **attributes: Any) -> Any:
    """Q, DQ -> one operator on [1, 4, 6, 6] -> Q, DQ."""
    constants = [
        graphs.constant(np.float32(scale), "s"), graphs.constant(np.uint8(3), "z"),
        graphs.constant(np.float32(out_scale), "os"), graphs.constant(np.uint8(out_zero), "oz"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node(op, ["xd", "xd"] if op in ("Add", "Mul", "Concat") else ["xd"], ["y0"], **attributes),
        helper.make_node("QuantizeLinear", ["y0", "os", "oz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "os", "oz"], ["y"]),
    ]
    return graphs.model(nodes, [graphs.value("x", [1, 4, 6, 6])], [graphs.value("y", [None] * 4)], constants)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [("Add", {}), ("Mul", {}), ("Concat", {"axis": 1}), ("Sigmoid", {}), ("LeakyRelu", {"alpha": 0.1}),
     ("AveragePool", {"kernel_shape": [2, 2]}), ("GlobalAveragePool", {})],
)  # fmt: skip
def test_operators_between_codes_read_and_write_codes(tmp_path: Path, op: str, attributes: Any) -> None:
    found, notes = rewritten(around(op, **attributes), tmp_path)
    assert found == {"QuantizeLinear": 1, f"QLinear{op}": 1, "DequantizeLinear": 1} and not notes


def test_what_only_moves_values_moves_codes_where_the_scales_are_the_same(tmp_path: Path) -> None:
    same, notes = rewritten(around("MaxPool", out_scale=0.1, out_zero=3, kernel_shape=[2, 2]), tmp_path)
    assert same == {"QuantizeLinear": 1, "MaxPool": 1, "DequantizeLinear": 1} and not notes
    other, notes = rewritten(around("MaxPool", kernel_shape=[2, 2]), tmp_path)
    assert other["QuantizeLinear"] == 2 and notes == [
        "1 MaxPool between Q and DQ: its input and output have other scales"
    ]


def convolution(
    *, zero: int = 0, high: float = 6.0, scale: float = 0.02, relu: str = "Clip", float_bias: bool = False
) -> Any:
    """Q, DQ -> Conv -> Relu or Clip -> Q, DQ, with an int32 bias without a zero point."""
    constants = [
        graphs.constant(np.float32(0.05), "s"), graphs.constant(np.uint8(128), "z"),
        graphs.constant(np.random.default_rng(0).integers(-127, 128, (5, 4, 3, 3)).astype(np.int8), "w"),
        graphs.constant(np.linspace(0.001, 0.002, 5, dtype=np.float32), "ws"),
        graphs.constant(np.arange(-200, 300, 100).astype(np.int32), "b"),
        graphs.constant((np.linspace(0.001, 0.002, 5) * 0.05).astype(np.float32), "bs"),
        graphs.constant(np.ones(5, np.float32), "fb"),
        graphs.constant(np.float32(0), "low"), graphs.constant(np.float32(high), "high"),
        graphs.constant(np.float32(scale), "os"), graphs.constant(np.uint8(zero), "oz"),
    ]  # fmt: skip
    clip = ["c", "low", "high"] if relu == "Clip" else ["c"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "fb" if float_bias else "bd"], ["c"]),
        helper.make_node(relu, clip, ["r"]),
        helper.make_node("QuantizeLinear", ["r", "os", "oz"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "os", "oz"], ["y"]),
    ]
    return graphs.model(nodes, [graphs.value("x", [1, 4, 6, 6])], [graphs.value("y", [None] * 4)], constants)


@pytest.mark.parametrize("relu", ["Relu", "Clip"])
def test_rounding_to_codes_takes_the_place_of_a_rectifier(tmp_path: Path, relu: str) -> None:
    found, notes = rewritten(convolution(relu=relu), tmp_path)
    assert found == {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1} and not notes


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"zero": 7}, "the zero point behind its Clip is not the lowest code"),
        ({"high": 2.0}, "its codes reach beyond its Clip"),
        ({"float_bias": True}, "its bias is float"),
    ],
)
def test_what_codes_cannot_do_stays_with_its_reason(tmp_path: Path, settings: Any, reason: str) -> None:
    found, notes = rewritten(convolution(**settings), tmp_path)
    assert found["Conv"] == 1 and notes == [f"1 Conv between Q and DQ: {reason}"]


def test_a_value_that_is_also_wanted_in_float_is_kept_in_float(tmp_path: Path) -> None:
    model = convolution(relu="Relu")
    model.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [None] * 4))
    found, notes = rewritten(model, tmp_path)
    assert found["Conv"] == 1 and "also wanted in float" in notes[0]


def test_a_model_without_q_and_dq_is_left_as_it_is_and_told_so(tmp_path: Path) -> None:
    model = quantized(graphs.one("MatMul", graphs.normal(8, 6), ["batch", 8]), tmp_path, (32, 8), "dynamic-int8")
    _, notes = rewritten(model, tmp_path)
    assert notes == ["nothing in the model is in QDQ form, so there is nothing to rewrite"]


def test_another_form_is_refused(tmp_path: Path) -> None:
    onnx.save(graphs.residual_network(), tmp_path / "model.onnx")
    with pytest.raises(FormatError, match="qdq or qoperator"):
        write_artefact(tmp_path / "model.onnx", tmp_path / "out.onnx", form="qlinear")
    assert not (tmp_path / "out.onnx").exists()


def test_a_shape_asked_of_a_weight_does_not_keep_the_float_weight(tmp_path: Path) -> None:
    model = graphs.one("MatMul", graphs.normal(64, 48), ["batch", 64])
    model.graph.node.append(helper.make_node("Shape", ["layer.weight"], ["sides"], start=0, end=1))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["sides"], ["zeros"]))
    model.graph.output.append(helper.make_tensor_value_info("zeros", TensorProto.FLOAT, [None]))
    small = quantized(model, tmp_path, (32, 64), "weight-int8")
    assert "layer.weight" not in {tensor.name for tensor in small.graph.initializer}
    assert run(tmp_path / "small.onnx", graphs.normal(2, 64)).shape == (2, 48)
