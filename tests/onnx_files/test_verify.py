"""Verifying ONNX files: against the module they were made of, and the float file; where ONNX Runtime differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from onnx import TensorProto, helper
from tests.onnx_files.graphs import constant, model, normal, residual_network, value

import narrowcast as nc
from narrowcast.errors import KernelError, ModelError
from narrowcast.nn.integer_graph import graph_of


class Net(nn.Module):
    """A folded BatchNorm, a ReLU6 that codes take in, a residual, and a linear layer behind an average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.act, self.head = nn.ReLU6(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = x + self.conv3(functional.relu(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def images(seed: int) -> Tensor:
    return torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


DATA = [images(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("made") / "model.onnx"
    net = Net().eval()
    quantized = nc.quantize(net, "static-int8", [images(9)], progress=False)
    nc.export.onnx(quantized, path, [images(9)])
    return net, quantized, path


def row(parity: nc.Parity, name: str) -> Any:
    return next(layer for layer in parity.layers if layer.layer == name)


def with_other_code(path: Path, target: Path, layer: str) -> Path:
    """The file with one weight code of a layer changed by 32."""
    proto = onnx.load(path)
    for position, tensor in enumerate(proto.graph.initializer):
        if tensor.name == f"{layer}.weight_quantized":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[5] ^= 32
            proto.graph.initializer[position].CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, target)
    return target


def test_an_exported_file_is_within_the_bounds_of_its_module_in_every_layer(made: Any) -> None:
    _, quantized, path = made
    before = path.read_bytes()
    parity = nc.verify(quantized, path, DATA)
    assert parity.ok, str(parity)
    assert [layer.layer for layer in parity.layers] == ["conv1", "conv2", "conv3", "head"]
    assert row(parity, "conv2").bound.startswith("1 code") and row(parity, "conv3").bound.startswith("1e-5")
    assert "int8/channel x uint8/channel" in row(parity, "conv1").artefact
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


def test_a_network_runs_layer_by_layer_while_it_is_compared_and_as_one_afterwards(made: Any) -> None:
    model = made[1].model
    fused = [module for module in model.modules() if graph_of(module) is not None]
    assert fused
    parity = nc.verify(made[1], made[2], DATA)
    assert any("ran layer by layer" in note for note in parity.notes)
    assert [module for module in model.modules() if graph_of(module) is not None] == fused


@pytest.mark.parametrize("layer", ["conv1", "conv2", "head"])
def test_a_changed_code_in_the_file_is_found_in_its_layer(made: Any, layer: str, tmp_path: Path) -> None:
    faulty = with_other_code(made[2], tmp_path / "faulty.onnx", layer)
    parity = nc.verify(made[1], faulty, DATA)
    assert not parity.ok and parity.first_beyond == layer
    assert "stored differently: 1 of" in row(parity, layer).reason
    assert sum(entry.verdict == "BEYOND" for entry in parity.layers) == 1, "layers behind it are right alone"


def test_a_float_module_and_its_quantized_file_need_a_tolerance(made: Any) -> None:
    parity = nc.verify(made[0], made[2], DATA)
    assert not parity.ok and "tolerance" in parity.summary()
    assert [layer.layer for layer in parity.layers] == ["conv1", "conv2", "conv3", "head"]
    assert nc.verify(made[0], made[2], DATA, tolerance="20dB").ok


def test_the_file_can_be_the_reference(made: Any) -> None:
    assert nc.verify(made[2], made[1], DATA).ok
    assert nc.verify(made[2], made[2], DATA).equal


@pytest.mark.parametrize("recipe", ["static-int8", "dynamic-int8", "weight-int4"])
def test_a_float_file_is_compared_with_the_quantized_one_by_the_names_of_weights(recipe: str, tmp_path: Path) -> None:
    proto = residual_network()
    onnx.save(proto, tmp_path / "float.onnx")
    data = [{"x": torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))}]
    nc.save(nc.quantize(tmp_path / "float.onnx", recipe, data, progress=False), tmp_path / "small.onnx")
    parity = nc.verify(tmp_path / "float.onnx", tmp_path / "small.onnx", data)
    assert not parity.ok and parity.first_difference == "stem"
    assert [layer.layer for layer in parity.layers] == ["stem", "depthwise", "head"]
    assert nc.verify(proto, onnx.load(tmp_path / "small.onnx"), data, tolerance="10dB").ok


def test_activations_that_a_module_has_taken_in_and_tables_are_part_of_the_layer(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.act = nn.Embedding(30, 32), nn.Linear(32, 64), nn.GELU()
            self.down = nn.Linear(64, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.down(self.act(self.up(self.table(ids))))

    torch.manual_seed(0)
    ids = [torch.randint(0, 30, (4, 6))]
    for recipe in ("weight-int8", "static-int8"):
        quantized = nc.quantize(Words().eval(), recipe, ids, progress=False)
        nc.export.onnx(quantized, tmp_path / "words.onnx", ids)
        parity = nc.verify(quantized, tmp_path / "words.onnx", ids)
        assert parity.ok, str(parity)
        assert {"table", "up", "down"} <= {layer.layer for layer in parity.layers}


def test_it_says_where_the_runtime_changes_the_arithmetic(tmp_path: Path) -> None:
    weight = (normal(64, 32) * 100).clip(-127, 127).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["layer.weight_quantized", "scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = [constant(weight, "layer.weight_quantized"), constant(np.full(32, 0.01, np.float32), "scale")]
    stored = model(nodes, [value("x", ["batch", 64])], [value("y", ["batch", 32])], constants, 17)
    floats = model(
        [helper.make_node("MatMul", ["x", "layer.weight"], ["y"])], [value("x", ["batch", 64])],
        [value("y", ["batch", 32])], [constant(weight * np.float32(0.01), "layer.weight")],
    )  # fmt: skip
    parity = nc.verify(floats, stored, [{"x": torch.randn(4, 64)}], tolerance="1e-1")
    assert any("MatMulNBits of level 4" in note and "qdq_matmulnbits_accuracy_level" in note for note in parity.notes)


def test_fp16_is_said_to_be_computed_in_float32(tmp_path: Path) -> None:
    half = TensorProto.FLOAT16
    weight = constant(normal(8, 4).astype(np.float16), "layer.weight")
    nodes = [helper.make_node("MatMul", ["x", "layer.weight"], ["y"])]
    proto = model(nodes, [value("x", ["batch", 8], half)], [value("y", ["batch", 4], half)], [weight])
    parity = nc.verify(proto, proto, [{"x": torch.randn(4, 8).half()}], tolerance="1e-2")
    assert any("computed in float32" in note for note in parity.notes)


def test_kernels_of_a_file_cannot_be_chosen_and_strangers_are_refused(made: Any) -> None:
    with pytest.raises(KernelError, match="runs in ONNX Runtime"):
        nc.verify(made[1], made[2], DATA, kernels=(None, "reference"))
    with pytest.raises(ModelError, match="no layer of the same name"):
        nc.verify(nn.Sequential(nn.Linear(3, 3)).eval(), made[2], DATA)
