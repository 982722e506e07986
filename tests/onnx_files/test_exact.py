"""An exported static model computes the module's own integers: every value is rounded once, in the module's codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.models.onnx_handover import Codes


class Images(nn.Module):
    """Everything that codes travel through: ReLU6, a depthwise layer, a pool, branches, a residual, an average."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 24, 3, padding=1)
        self.joined = nn.Conv2d(32, 16, 1)
        self.linear_bottleneck = nn.Conv2d(16, 12, 1)
        self.wide = nn.Conv2d(12, 16, 3, padding=1)
        self.narrow = nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(x))
        x = functional.max_pool2d(functional.relu6(self.depthwise(x)), 2)
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        x = x + self.joined(both)
        x = self.linear_bottleneck(x)
        x = functional.relu(self.wide(x)) + self.narrow(x)
        return self.head(x.mean((2, 3)))


def spread_channels_(model: nn.Module) -> nn.Module:
    """Channels of very different size, which one range for all serves badly."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= torch.logspace(-1.2, 0.8, len(module.weight)).view(-1, 1, 1, 1)
                module.bias[:4] = -1.0
    return model


def images(seed: int, count: int = 24) -> Tensor:
    scale = torch.tensor([0.3, 1.0, 2.0]).view(1, 3, 1, 1)
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * scale + 0.3


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exact") / "model.onnx"
    quantized = nc.quantize(spread_channels_(Images().eval()), "static-int8", [images(1)], progress=False)
    return quantized.model, nc.export.onnx(quantized, path, [images(1)]), path


def answers(path: Path, x: Tensor) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_the_file_answers_what_the_module_answers_with_a_range_per_channel(exported: Any) -> None:
    module, written, path = exported
    x = images(2, 7)
    assert sqnr_db(module(x), answers(path, x)) > 50
    assert all(row.integer and not row.note for row in written.layers), str(written)


def test_codes_hand_over_where_a_convolution_reads_and_floats_where_something_is_added(exported: Any) -> None:
    _, written, _ = exported
    kernels = {row.layer: row.kernel for row in written.layers}
    floats = {"depthwise", "joined", "linear_bottleneck", "wide", "narrow"}  # added, read in two ranges, or averaged
    assert {layer for layer, kernel in kernels.items() if kernel == "ConvInteger"} == floats
    assert all(kernels[layer] == "QLinearConv" for layer in ("stem", "left", "right"))


def test_the_file_has_the_codes_of_the_module(exported: Any) -> None:
    module, _, path = exported
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name, layer in module.named_modules():
        if hasattr(layer, "quantized_weights"):
            codes = layer.quantized_weights()["weight"].codes.numpy()
            array = stored[f"{name}.weight_quantized"].astype(np.int64).reshape(codes.shape)
            assert np.array_equal(array - (128 if stored[f"{name}.weight_quantized"].dtype == np.uint8 else 0), codes)


def test_a_module_that_was_trained_with_quantization_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = nc.qat.prepare(spread_channels_(Images().eval()), "static-int8", [images(1)])
    optimizer = torch.optim.SGD(nc.qat.parameter_groups(prepared, lr=1e-3))
    prepared.train()
    for seed in range(3):
        optimizer.zero_grad()
        prepared(images(seed)).square().mean().backward()
        optimizer.step()
    module = nc.qat.convert(prepared.eval())
    written = nc.export.onnx(module, tmp_path / "model.onnx", [images(1)])
    assert sqnr_db(getattr(module, "model", module)(images(5)), answers(tmp_path / "model.onnx", images(5))) > 45
    assert all(row.integer for row in written.layers)


def test_a_bias_that_post_training_quantization_leaves_is_a_whole_number_of_steps(exported: Any) -> None:
    for layer in exported[0].modules():
        if isinstance(getattr(layer, "kernel_scale", None), Tensor) and layer.bias is not None:
            steps = layer.bias.double() / layer.kernel_scale.double()
            assert float((steps - steps.round()).abs().max()) < 1e-2 + 1e-6 * float(steps.abs().max())


def test_codes_cut_like_a_clip_only_where_they_end_below_it() -> None:
    zero = np.zeros(2, np.int64)
    assert Codes.of(np.array([6 / 255, 1 / 255]), zero, 1).cuts_at(6.0)
    assert not Codes.of(np.array([6.1 / 255, 1 / 255]), zero, 1).cuts_at(6.0)
    assert not Codes.of(np.array([1 / 255, 1 / 255]), np.array([3, 3]), 1).cuts_at(6.0)
