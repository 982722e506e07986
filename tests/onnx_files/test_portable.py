"""Products that saturate on CPUs without VNNI: found, told, repaired; against an emulation of the instruction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import helper, numpy_helper
from tests.onnx_files import graphs
from tests.onnx_files.test_recurrent import X as STEPS
from tests.onnx_files.test_recurrent import recurrent

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.models import onnx_portable as portable
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_session import OnnxModule
from narrowcast.models.onnx_verdict import node_verdicts, optimized_graph
from narrowcast.recipe import load_recipe


def saturating(x: Any, weight: Any) -> Any:
    """What vpmaddubsw and a widening sum make of x [n, K] uint8 and weight [K, m] int8: pairs saturate in 16 bits."""
    even = x.shape[1] % 2
    x, weight = np.pad(x, ((0, 0), (0, even))).astype(np.int64), np.pad(weight, ((0, even), (0, 0))).astype(np.int64)
    products = x[:, :, None] * weight[None]
    return np.clip(products[:, 0::2] + products[:, 1::2], -32768, 32767).sum(1)


def exact(x: Any, weight: Any) -> Any:
    return x.astype(np.int64) @ weight.astype(np.int64)


def codes(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def worst_inputs(row: Any) -> Any:
    """Inputs that are largest where a row's weights have one sign, and the other way round."""
    return np.stack([np.where(row > 0, 255, 0), np.where(row < 0, 255, 0)]).astype(np.uint8)


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_rows_are_at_risk_exactly_where_an_input_saturates(columns: int) -> None:
    weight = codes(200, columns) // np.random.default_rng(1).integers(1, 4, (200, 1)).astype(np.int8)
    for row, worst in zip(weight, portable.worst_pairs(weight), strict=True):
        x = worst_inputs(row)
        same = np.array_equal(saturating(x, row[:, None]), exact(x, row[:, None]))
        assert same == (worst <= portable.LARGEST_PAIR)


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 289])
def test_narrowed_rows_never_saturate_and_rows_without_risk_stay(columns: int) -> None:
    weight = codes(100, columns)
    weight[::3] //= 2
    new, factor = portable.narrowed(weight)
    guilty = portable.worst_pairs(weight) > portable.LARGEST_PAIR
    assert (portable.worst_pairs(new) <= portable.LARGEST_PAIR).all()
    assert np.array_equal(new[~guilty], weight[~guilty])
    assert (factor[~guilty] == 1.0).all()
    assert (factor <= 254 / 128 + 1e-6).all()
    for row in new:
        x = worst_inputs(row)
        assert np.array_equal(saturating(x, row[:, None]), exact(x, row[:, None]))


def test_narrowing_loses_less_than_seven_bits() -> None:
    weight = codes(64, 288)
    new, factor = portable.narrowed(weight)
    error = ((new * factor[:, None] - weight) ** 2).mean()
    seven = np.abs(weight.astype(np.float64)).max(1, keepdims=True) / 64
    assert error < ((np.rint(weight / seven) * seven - weight) ** 2).mean()


def test_patches_of_a_convolution_are_multiplied_with_channels_last() -> None:
    weight = codes(4, 3, 2, 2)  # [out, in, height, width]
    order = portable.order_of("Conv", weight.shape, 1)
    assert np.array_equal(weight.reshape(4, -1)[:, order], weight.transpose(0, 2, 3, 1).reshape(4, -1))
    assert portable.order_of("Conv", (8, 1, 3, 3), 8) is None  # depthwise
    assert portable.order_of("Conv", (16, 1, 3, 3), 8) is not None  # two outputs for each input channel


def network() -> Any:
    """A convolution and a Gemm all of whose weights have one sign, so that every row is at risk."""
    model = graphs.residual_network()
    for tensor in model.graph.initializer:
        if tensor.name in ("stem.weight", "head.weight"):
            tensor.CopyFrom(graphs.constant(np.abs(numpy_helper.to_array(tensor)) + 0.2, tensor.name))
    return model


X = torch.from_numpy(graphs.normal(96, 3, 12, 12, seed=20))


def recipe(preset: str, **more: Any) -> dict[str, Any]:
    return load_recipe(preset).to_dict() | more


def told(model: Any) -> list[str]:
    return [row.saturates for row in node_verdicts(optimized_graph(model.graph)) if row.saturates]


@pytest.mark.parametrize(
    ("preset", "make", "data", "at_risk"),
    [("static-int8", network, X, 2), ("dynamic-int8", network, X, 1), ("dynamic-int8", recurrent, [STEPS], 1)],
)
def test_a_portable_recipe_leaves_no_layer_at_risk(preset: str, make: Any, data: Any, at_risk: int) -> None:
    plain = nc.quantize(make(), preset, data, progress=False)
    assert len(told(plain.model)) == at_risk
    assert any("portable = true repairs it" in note for note in plain.report.notes)
    repaired = nc.quantize(make(), recipe(preset, portable=True), data, progress=False)
    assert told(repaired.model) == []
    assert sum("CPUs without VNNI: " in note for note in repaired.report.notes) >= at_risk
    inputs = data if isinstance(data, torch.Tensor) else data[0]
    expected, got = OnnxModel(make()).original(inputs), repaired.model(inputs)
    first, second = (expected, got) if isinstance(expected, torch.Tensor) else (expected[0], got[0])
    assert sqnr_db(first, second) > 28


@pytest.mark.parametrize(
    ("preset", "make", "data"),
    [("static-int8", network, X), ("dynamic-int8", network, X), ("dynamic-int8", recurrent, [STEPS])],
)
def test_weights_stored_as_uint8_give_the_same_integers(
    preset: str, make: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no VNNI: int8 weights at risk saturate here")
    monkeypatch.setattr(portable, "ALLOWED_LOSS_DB", -1.0)
    repaired = nc.quantize(make(), recipe(preset, portable=True), data, progress=False)
    assert any("stored as uint8" in note for note in repaired.report.notes)
    assert told(repaired.model) == []
    monkeypatch.undo()
    inputs = data if isinstance(data, torch.Tensor) else data[0]
    plain = nc.quantize(make(), preset, data, progress=False)
    first, second = plain.model(inputs), repaired.model(inputs)
    for one, other in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (first, second)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    kernels = {row.kernel for row in node_verdicts(optimized_graph(repaired.model.graph)) if row.bits}
    assert kernels <= {"QLinearConv", "QGemm", "ConvInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}


def test_only_guilty_layers_are_changed() -> None:
    small = network()
    for tensor in small.graph.initializer:
        if tensor.name == "head.weight":  # one large weight in each row, so that no pair is too large
            array = np.full((5, 8), 0.01, np.float32)
            array[:, 3] = 1.0
            tensor.CopyFrom(graphs.constant(array, tensor.name))
    repaired = nc.quantize(small, recipe("static-int8", portable=True), X, progress=False)
    notes = [note for note in repaired.report.notes if "CPUs without VNNI: " in note]
    assert len(notes) == 1
    assert "8 of 8 channels" in notes[0]


def test_the_switch_is_part_of_the_recipe() -> None:
    made = load_recipe(recipe("static-int8", portable=True))
    assert made.portable
    assert load_recipe(json.loads(json.dumps(made.to_dict()))) == made
    assert not load_recipe("static-int8").portable


def test_onnx_runtime_saturates_as_emulated_where_the_cpu_has_no_vnni() -> None:
    if "vnni" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has VNNI, which sums in 32 bits")
    x, weight = np.full((3, 38), 255, np.uint8), codes(38, 16)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    model = graphs.model([node], [graphs.value("x", [3, 38], 2)], [graphs.value("y", [3, 16], 6)],
                         [graphs.constant(weight, "w")])  # fmt: skip
    from narrowcast.models.onnx_file import read_onnx

    got = OnnxModule(read_onnx(model), "one")(torch.from_numpy(x))
    assert np.array_equal(got.numpy(), saturating(x, weight))
