"""From an ONNX model to a quantized one: every preset, the report, the file, and what is refused."""

from __future__ import annotations

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
from narrowcast.errors import CheckpointError, DataError, ModelError, RecipeError

X = torch.from_numpy(graphs.normal(96, 3, 12, 12, seed=20))
INTEGER = {"static-int8": {"QLinearConv", "QGemm"}, "dynamic-int8": {"ConvInteger", "DynamicQuantizeMatMul"}}


def quantized(recipe: Any, data: Any = X, model: Any = None, **options: Any) -> Any:
    return nc.quantize(graphs.residual_network() if model is None else model, recipe, data, progress=False, **options)


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("static-int8", 30), ("dynamic-int8", 32), ("dynamic-int4", 20), ("weight-int8", 36), ("weight-int4", 20),
     ("fp16", 50), ("bf16", 40)],
)  # fmt: skip
def test_every_preset_keeps_the_answers(recipe: str, least: float) -> None:
    result = quantized(recipe)
    unseen = torch.from_numpy(graphs.normal(64, 3, 12, 12, seed=21))
    from narrowcast.models.onnx_model import OnnxModel

    expected = OnnxModel(graphs.residual_network()).original(unseen)
    assert sqnr_db(expected, result.model(unseen)) > least
    assert result.report.totals.coverage == 1.0
    assert {row.outcome for row in result.report.layers} == {"quantized"}


@pytest.mark.parametrize("recipe", INTEGER)
def test_integer_presets_run_in_integer_kernels_only(recipe: str) -> None:
    report = quantized(recipe, strict=True).report
    assert {row.kernel for row in report.layers} == INTEGER[recipe]
    assert report.totals.integer_macs == 1.0


def test_the_chain_of_a_static_network_has_no_float_product_or_addition(tmp_path) -> None:
    result = quantized("static-int8")
    from narrowcast.models.onnx_session import open_session

    open_session(result.model.graph, optimized=tmp_path / "optimized.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert operators <= {"QuantizeLinear", "DequantizeLinear", "Transpose", "Flatten", "QLinearConv", "QLinearAdd",
                         "QLinearGlobalAveragePool", "QGemm", "Reshape"}  # fmt: skip


def test_a_saved_file_answers_in_onnx_runtime_what_the_result_answers(tmp_path) -> None:
    result = quantized("static-int8")
    nc.save(result, tmp_path / "small.onnx")
    session = ort.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": X.numpy()})[0], result.model(X).numpy())
    onnx.checker.check_model(onnx.load(tmp_path / "small.onnx"))
    with pytest.raises(CheckpointError, match=r"ends in \.onnx"):
        nc.save(result, tmp_path / "directory")


def test_the_input_is_not_changed_and_results_do_not_depend_on_the_split_of_the_data() -> None:
    model = graphs.residual_network()
    before = model.SerializeToString()
    whole = quantized("static-int8", [X], model)
    parts = quantized("static-int8", list(X.split(7)), model)
    assert model.SerializeToString() == before
    assert torch.equal(whole.model(X), parts.model(X))


def test_data_comes_as_arrays_dictionaries_and_batches_with_targets() -> None:
    expected = quantized("static-int8").model(X)
    for data in (X.numpy(), {"x": X}, [(part, torch.zeros(len(part))) for part in X.split(32)]):
        assert torch.equal(quantized("static-int8", data).model(X), expected)


@pytest.mark.parametrize("observer", ["minmax", "moving_average(0.9)", "percentile(99.9)", "entropy", "mse", "best"])
def test_every_observer_can_choose_static_ranges(observer: str) -> None:
    rule = {"weight": "int8/channel", "input": f"uint8/tensor static:{observer}"}
    result = quantized({"rule": [rule]})
    assert result.report.totals.output_sqnr_db > 15


def test_gptq_sees_the_inputs_and_loses_less_than_rounding() -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        rows = quantized({"rule": [{"weight": "int4/channel", "method": method}]}).report.layers
        errors[method] = {row.layer: row.errors[-1].output_error for row in rows}
        assert all(row.method.startswith(method) for row in rows)
    assert all(error is not None for error in errors["gptq"].values())
    assert all(row.errors[-1].output_error <= row.errors[0].output_error * 1.05 for row in rows)


def test_a_rule_keeps_a_layer_by_name_and_by_type() -> None:
    rules = [{"layers": "head", "keep": "it is small"}, {"type": "Conv2d", "weight": "int8/channel"}]
    rows = {row.layer: row for row in quantized({"rule": rules}).report.layers}
    assert rows["head"].outcome == "kept" and rows["head"].reason == "it is small"
    assert rows["stem"].outcome == rows["depthwise"].outcome == "quantized"


def test_a_plan_tells_kernels_without_data() -> None:
    plan = nc.plan(graphs.residual_network(), "static-int8")
    assert {row.layer.name: row.kernel for row in plan.layers} == {
        "stem": "QLinearConv", "depthwise": "QLinearConv", "head": "QGemm",
    }  # fmt: skip


def test_a_transposed_convolution_is_stored_in_integers_and_its_reason_told() -> None:
    model = graphs.one("ConvTranspose", graphs.normal(4, 8, 3, 3), ["n", 4, 9, 9], rank=4)
    result = quantized("static-int8", torch.from_numpy(graphs.normal(40, 4, 9, 9)), model)
    (row,) = result.report.layers
    assert row.outcome == "fell back" and "no integer kernel for ConvTranspose" in row.reason
    with pytest.raises(nc.ContractError, match="ConvTranspose"):
        quantized("static-int8", torch.from_numpy(graphs.normal(40, 4, 9, 9)), model, strict=True)


def test_shared_and_transposed_weights_are_one_layer_with_two_uses() -> None:
    from onnx import TensorProto, helper

    table = graphs.normal(30, 16)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["found", "turned"], ["logits"]),
    ]
    model = graphs.model(nodes, [graphs.value("ids", ["n", "t"], TensorProto.INT64)],
                         [graphs.value("logits", ["n", "t", 30])], [graphs.constant(table, "table")])  # fmt: skip
    ids = torch.randint(0, 30, (40, 6), generator=torch.Generator().manual_seed(0))
    result = quantized("dynamic-int8", [ids], model)
    (row,) = result.report.layers
    assert row.outcome == "quantized" and "tied" in row.reason and "stored 2 times" in row.reason
    assert "DynamicQuantizeMatMul" in row.kernel
    assert result.report.totals.output_sqnr_db > 30


def test_padding_and_batchnorm_are_folded_and_the_float_function_stays() -> None:
    from onnx import helper

    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("Conv", ["padded", "w"], ["c"], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    constants = [graphs.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64), "pads"),
                 graphs.constant(graphs.normal(8, 3, 3, 3), "w")]  # fmt: skip
    constants += [graphs.constant(graphs.normal(8, seed=i), name) for i, name in enumerate(("gamma", "beta", "mean"))]
    constants += [graphs.constant(np.square(graphs.normal(8, seed=5)) + 0.1, "variance")]
    model = graphs.model(nodes, [graphs.value("x", ["b", 3, 12, 12])], [graphs.value("y", ["b", 8, 6, 6])], constants)
    from narrowcast.models.onnx_model import OnnxModel

    adapter = OnnxModel(model)
    assert {node.op_type for node in adapter.graph.graph} == {"Conv", "Relu"}
    assert sqnr_db(adapter.original(X), adapter.model(X)) > 100
    result = quantized("static-int8", X, model)
    assert {row.kernel for row in result.report.layers} == {"QLinearConv"}
    assert any("1 BatchNorms were folded" in note for note in result.report.notes)


def test_weights_in_subgraphs_are_quantized_without_static_ranges() -> None:
    from onnx import TensorProto, helper

    def branch(name: str, seed: int) -> Any:
        node = helper.make_node("MatMul", ["x", f"{name}.w"], [f"{name}_y"])
        return helper.make_graph([node], name, [], [graphs.value(f"{name}_y", ["n", 8])],
                                 [graphs.constant(graphs.normal(16, 8, seed=seed), f"{name}.w")])  # fmt: skip

    node = helper.make_node("If", ["choose"], ["y"], then_branch=branch("yes", 1), else_branch=branch("no", 2))
    model = graphs.model([node], [graphs.value("x", ["n", 16]), graphs.value("choose", [], TensorProto.BOOL)],
                         [graphs.value("y", ["n", 8])], [])  # fmt: skip
    x = torch.from_numpy(graphs.normal(40, 16))
    batches = [(x, torch.tensor(True)), (x, torch.tensor(False))]
    for recipe in ("dynamic-int8", "weight-int8", "static-int8"):
        result = quantized(recipe, batches, model)
        assert len(result.report.layers) == 2
        assert all(row.spec.startswith("int8") for row in result.report.layers)
        for batch in batches:
            from narrowcast.models.onnx_model import OnnxModel

            assert sqnr_db(OnnxModel(model).original(*batch), result.model(*batch)) > 30
    assert all("inside a subgraph" in row.reason for row in result.report.layers)


def test_what_cannot_be_done_is_said_before_any_work() -> None:
    for recipe, words in (
        ({"transforms": ["rotate"], "rule": [{"weight": "int8"}]}, "knows the decoders of transformers"),
        ({"rule": [{"weight": "int8", "input": "int8/token outliers:top(1%)"}]}, "outlier channels"),
        ({"rule": [{"layers": "nothing.*", "weight": "int8"}]}, "matches no layer"),
    ):
        with pytest.raises(RecipeError, match=words):
            quantized(recipe)
    with pytest.raises(DataError, match="there is none"):
        quantized("static-int8", None)
    with pytest.raises(ModelError, match="not changed in place"):
        quantized("dynamic-int8", inplace=True)
    with pytest.raises(DataError, match=r"wants .* and the data has the shape"):
        quantized("dynamic-int8", [torch.randn(2, 4, 5, 5)])


def test_formats_without_a_form_in_onnx_are_kept_with_the_reason() -> None:
    rows = quantized({"rule": [{"weight": "nf4/group32"}]}).report.layers
    assert all(row.outcome == "kept" and "nf4" in row.reason for row in rows)
    with pytest.raises(nc.ContractError, match="nf4"):
        quantized({"rule": [{"weight": "nf4/group32"}]}, strict=True)


def test_a_solver_without_input_vectors_is_replaced_with_the_reason() -> None:
    model = graphs.one("ConvTranspose", graphs.normal(6, 4, 3, 3, seed=1), [None, 6, 8, 8], rank=4)
    data = (torch.from_numpy(graphs.normal(4, 6, 8, 8, seed=seed)) for seed in range(3))
    (row,) = quantized({"rule": [{"weight": "int4/channel"}]}, data, model).report.layers
    assert row.outcome == "quantized" and "cannot be taken from its input" in row.reason + "".join(row.notes)
