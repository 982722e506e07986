"""`nc.export.onnx`: a quantized PyTorch model as an ONNX file with the same integers and the same answers."""

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


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.conv = nn.Conv1d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(functional.gelu(self.up(x)))
        return self.head(self.conv(x.transpose(1, 2)).relu().mean(-1))


IDS = torch.randint(0, 50, (64, 12), generator=torch.Generator().manual_seed(1))
UNSEEN = torch.randint(0, 50, (7, 9), generator=torch.Generator().manual_seed(2))


def exported(recipe: Any, path: Path) -> tuple[Any, Any, Any, nn.Module]:
    torch.manual_seed(0)
    model = Tokens().eval()
    quantized = nc.quantize(model, recipe, [IDS], progress=False)
    written = nc.export.onnx(quantized, path, [IDS])
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return quantized, written, lambda ids: torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0]), model


@pytest.mark.parametrize("recipe", ["weight-int8", "weight-int4", "fp16"])
def test_with_float_inputs_the_file_answers_what_the_module_answers(recipe: str, tmp_path: Path) -> None:
    quantized, written, run, _ = exported(recipe, tmp_path / "model.onnx")
    assert sqnr_db(quantized.model(UNSEEN), run(UNSEEN)) > 110  # another batch and length, too
    assert {row.layer for row in written.layers} == {"table", "up", "down", "conv", "head"}


@pytest.mark.parametrize("recipe", ["dynamic-int8", "dynamic-int4", "static-int8"])
def test_with_integer_inputs_the_file_runs_integer_kernels_and_is_as_near_to_the_float_model(
    recipe: str, tmp_path: Path
) -> None:
    quantized, written, run, model = exported(recipe, tmp_path / "model.onnx")
    assert all(row.integer for row in written.layers if row.layer != "table"), str(written)
    expected = model(UNSEEN).detach()
    assert sqnr_db(expected, run(UNSEEN)) > min(30, sqnr_db(expected, quantized.model(UNSEEN)) - 4)


def test_the_codes_in_the_file_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    rule = {"type": "Linear", "weight": "int8/channel", "input": "uint8/tensor static:minmax"}
    quantized, _, _, _ = exported({"rule": [rule]}, tmp_path / "model.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name in ("up", "down", "head"):
        codes = quantized.model.get_submodule(name).quantized_weights()["weight"].codes.numpy()
        array = stored[f"{name}.weight_quantized"]
        assert np.array_equal(array if name == "head" else array.T, codes)  # a Gemm reads [out, in], a MatMul [in, out]


def test_a_float_model_and_a_module_without_a_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(nc.ModelError, match="no quantized module"):
        nc.export.onnx(Tokens(), tmp_path / "model.onnx", [IDS])
    recurrent = nc.quantize(nn.LSTM(8, 8, batch_first=True), "dynamic-int8", progress=False)
    with pytest.raises(nc.ModelError, match="no form in ONNX"):
        nc.export.onnx(recurrent, tmp_path / "model.onnx", [torch.randn(2, 3, 8)])
    assert not list(tmp_path.iterdir())
