"""A range per token in ONNX files: the codes of narrowcast's modules, in kernels of integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from tests.onnx_files.graphs import normal, one

import narrowcast as nc
from narrowcast.core import QuantSpec, quantize
from narrowcast.errors import FormatError
from narrowcast.kernels import reference_linear
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_verdict import node_verdicts, optimized_graph
from narrowcast.nn import Activation

WEIGHT, BIAS = normal(24, 40, seed=1), normal(24, seed=2)


def tokens(*shape: int) -> torch.Tensor:
    """Rows of very different sizes, not centred, one of them zero."""
    x = torch.from_numpy(normal(*shape, seed=5)) + 0.4
    x = x * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., 1, :] = 0
    return x


def written(op: str, rank: int, bias: Any, given: str) -> tuple[OnnxModel, Any]:
    shape = ["batch", "tokens", 40][3 - rank :]
    attributes = {"transB": 1} if op == "Gemm" else {}
    graph = one(op, WEIGHT if op == "Gemm" else WEIGHT.T.copy(), shape, bias=bias, rank=rank, **attributes)
    adapter = OnnxModel(graph, token_ranges=True)
    (layer,) = [layer for layer in adapter.layers() if layer.type == "Linear"]
    record = quantize(adapter.weight(layer), QuantSpec.parse("int8/channel"))
    (site,) = layer.sites
    adapter.install(site.path, adapter.build(site.path, {site.path: record}, Activation(QuantSpec.parse(given))))
    adapter.finish()
    return adapter, record


@pytest.mark.parametrize("given", ["int8/token", "uint8/token"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
@pytest.mark.parametrize(("op", "rank"), [("Gemm", 2), ("MatMul", 2), ("MatMul", 3)])
def test_a_product_has_the_codes_of_the_module_and_one_integer_kernel(
    op: str, rank: int, bias: Any, given: str
) -> None:
    adapter, record = written(op, rank, bias, given)
    x = tokens(*((9, 40) if rank == 2 else (2, 9, 40)))
    sums = record.codes.sum(1, dtype=torch.int32)
    expected = reference_linear.linear_int8_dynamic(
        x, record.codes, record.scale[:, 0], sums, None if bias is None else torch.from_numpy(bias), given[0] == "i"
    )
    got = adapter.model(x)
    assert got.shape == expected.shape
    largest = expected.abs().amax(-1, keepdim=True).clamp(min=1e-9)  # of every token: another code would be 1e-4 of it
    assert ((got - expected).abs() / largest).max() < 2e-6
    rows = node_verdicts(optimized_graph(adapter.graph))
    assert [(row.kernel, row.integer) for row in rows] == [("MatMulIntegerToFloat", True)]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 6, -1) @ x
        return x + self.down(functional.gelu(self.up(x)))


def exported(path: Path, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    quantized = nc.quantize(Encoder().eval(), "dynamic-int8", progress=False)
    return quantized, nc.export.onnx(quantized, path, [tokens(2, 9, 32)], **options)


def test_an_exported_module_answers_as_the_module_and_verify_holds_every_layer_to_it(tmp_path: Path) -> None:
    quantized, written = exported(tmp_path / "model.onnx")
    assert {row.kernel for row in written.layers} == {"MatMulIntegerToFloat"}
    assert not any(row.note for row in written.layers), str(written)
    x = tokens(3, 9, 32)
    parity = nc.verify(quantized.model, tmp_path / "model.onnx", [x])
    assert parity.ok, str(parity)
    assert [row.layer for row in parity.layers] == ["query", "key", "up", "down"]
    assert all("1e-5" in row.bound for row in parity.layers), str(parity)


def test_a_changed_zero_point_is_found_in_its_layer(tmp_path: Path) -> None:
    quantized, _ = exported(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.startswith("down") and tensor.name.endswith("_zero_points_and_bias"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0] *= 1.01
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "other.onnx")
    parity = nc.verify(quantized.model, tmp_path / "other.onnx", [tokens(3, 9, 32)])
    assert not parity.ok and parity.first_beyond == "down", str(parity)


def test_one_range_per_input_is_the_named_option(tmp_path: Path) -> None:
    _, written = exported(tmp_path / "model.onnx", token_ranges=False)
    assert {row.kernel for row in written.layers} == {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    assert all("one range for all tokens" in row.note for row in written.layers)
    from narrowcast.export.artefact import write_artefact

    with pytest.raises(FormatError, match="token and input"):
        write_artefact(tmp_path / "model.onnx", tmp_path / "other.onnx", ranges="row")


def test_a_recipe_asks_for_ranges_per_token_of_onnx_files() -> None:
    recipe = nc.Recipe.from_dict({"token_ranges": True, "rule": [
        {"type": "Linear", "weight": "int8/channel", "input": "uint8/token"}]})  # fmt: skip
    assert nc.Recipe.from_dict(recipe.to_dict()) == recipe
    x = tokens(4, 9, 40)
    error = {}
    for asked in (recipe, "dynamic-int8"):
        graph = one("MatMul", WEIGHT.T.copy(), ["batch", "tokens", 40], bias=BIAS, rank=3)
        result = nc.quantize(graph, asked, x, progress=False)
        (row,) = [row for row in result.report.layers if row.outcome == "quantized"]
        largest = OnnxModel(graph).original(x)
        error[row.kernel] = float(((result.model(x) - largest).abs() / largest.abs().amax(-1, keepdim=True)).max())
    assert error["MatMulIntegerToFloat"] < 0.02 < error["DynamicQuantizeMatMul"]


def test_a_short_token_keeps_its_codes_beside_a_long_one() -> None:
    adapter, _ = written("MatMul", 3, BIAS, "uint8/token")
    x = tokens(1, 9, 40)
    beside = x.clone()
    beside[:, -1] *= 1000
    assert np.array_equal(adapter.model(x)[:, :-1], adapter.model(beside)[:, :-1])
