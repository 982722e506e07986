"""`portable = true` of a PyTorch model's recipe reaches its ONNX file: the module's codes, in uint8 where at risk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

import narrowcast as nc
from narrowcast.cli.app import app
from narrowcast.models.onnx_file import read_onnx
from narrowcast.models.onnx_verdict import node_verdicts, optimized_graph
from narrowcast.nn import is_portable
from narrowcast.recipe import load_recipe

ARCHITECTURE = """
import torch


def build():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(),
              torch.nn.Conv2d(8, 12, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(768, 40),
              torch.nn.ReLU(), torch.nn.Linear(40, 5)]
    model = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        for index in (0, 7):  # weights of one sign reach twice what 16 bits hold
            model[index].weight.abs_().add_(0.02)
        model[9].weight.mul_(0.01)[:, 3] = 1.0  # one large weight in each row: no pair is too large
    return model
"""
AT_RISK, DEPTHWISE, GIVES_FLOATS = ("0", "7"), "2", "4"  # what gives floats is a ConvInteger, whose weights are uint8
PORTABLE = {preset: load_recipe(preset).to_dict() | {"portable": True} for preset in ("static-int8", "dynamic-int8")}


def build() -> nn.Module:
    space: dict[str, Any] = {}
    exec(ARCHITECTURE, space)
    model: nn.Module = space["build"]()
    return model


def images(seed: int, count: int = 24) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) + 0.3


def codes_in(path: Path) -> dict[str, Any]:
    """The integers of every weight in a file, as they are stored."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name.removesuffix(".weight_quantized"): a for name, a in constants.items() if name.endswith("_quantized")}


def assert_portable(path: Path, module: nn.Module, *, unsigned: tuple[str, ...]) -> None:
    """The file has the module's codes, in uint8 with the zero point 128 for the named layers, and nothing saturates."""
    stored = codes_in(path)
    for name, layer in module.named_modules():
        if hasattr(layer, "quantized_weights"):
            codes = layer.quantized_weights()["weight"].codes.numpy()
            assert stored[name].dtype == (np.uint8 if name in unsigned else np.int8), name
            given = stored[name].astype(np.int64) - (128 if name in unsigned else 0)
            given = given.T if given.ndim == 2 and given.shape != codes.shape else given
            assert np.array_equal(given.reshape(codes.shape), codes), name
    assert not [row for row in node_verdicts(optimized_graph(read_onnx(path))) if row.saturates]


def answers(path: Path, x: Tensor) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A static model, what its export says, and the file."""
    path = tmp_path_factory.mktemp("portable") / "portable.onnx"
    result = nc.quantize(build(), PORTABLE["static-int8"], [images(1)], progress=False)
    return result, nc.export.onnx(result, path, [images(1)]), path


def test_layers_at_risk_are_uint8_and_every_code_is_the_modules(exported: Any) -> None:
    result, written, path = exported
    assert_portable(path, result.model, unsigned=(*AT_RISK, GIVES_FLOATS))
    assert sum("stored as uint8" in note for note in written.notes) == len(AT_RISK)
    kernels = {row.layer: row.kernel for row in written.layers}
    assert all(row.integer for row in written.layers)
    assert {kernels[name] for name in ("0", DEPTHWISE)} == {"QLinearConv"} and kernels["7"] == "QGemm"


def test_uint8_changes_no_number(exported: Any, tmp_path: Path) -> None:
    plain = nc.quantize(build(), "static-int8", [images(1)], progress=False)
    said = nc.export.onnx(plain, tmp_path / "plain.onnx", [images(1)]).notes
    assert any("portable = true repairs it" in note for note in said)
    stored = codes_in(tmp_path / "plain.onnx")
    assert all(stored[name].dtype == np.int8 for name in AT_RISK)
    if "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no VNNI: int8 weights at risk saturate here")
    assert torch.equal(answers(tmp_path / "plain.onnx", images(2, 9)), answers(exported[2], images(2, 9)))


@pytest.mark.parametrize(("by_token", "kernel"), [(True, "MatMulIntegerToFloat"), (False, "DynamicQuantizeMatMul")])
def test_dynamic_products_keep_their_codes_too(tmp_path: Path, by_token: bool, kernel: str) -> None:
    result = nc.quantize(build(), PORTABLE["dynamic-int8"], progress=False)
    written = nc.export.onnx(result, tmp_path / "portable.onnx", [images(1)], token_ranges=by_token)
    everywhere = (*AT_RISK, GIVES_FLOATS, DEPTHWISE)  # ConvInteger has uint8 always
    assert_portable(tmp_path / "portable.onnx", result.model, unsigned=everywhere)
    kernels = {row.layer: row.kernel for row in written.layers}
    assert kernels["7"] == kernel and kernels["0"] == "ConvInteger"


def test_modules_their_copies_and_checkpoints_know_whether_they_are_portable(exported: Any, tmp_path: Path) -> None:
    result = exported[0]
    nc.save(result, tmp_path / "portable")
    loaded = nc.load(tmp_path / "portable", build())
    assert all(is_portable(module) for module in (result.model, copy.deepcopy(result.model), loaded))
    nc.save(nc.quantize(build(), "static-int8", [images(1)], progress=False), tmp_path / "plain")
    assert not is_portable(nc.load(tmp_path / "plain", build()))


def test_the_command_exports_a_checkpoint_as_its_recipe_says(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nc.save(exported[0], tmp_path / "checkpoint")
    (tmp_path / "portable_net.py").write_text(ARCHITECTURE)
    monkeypatch.syspath_prepend(str(tmp_path))
    np.savez(tmp_path / "data.npz", x=images(1).numpy())
    out = tmp_path / "out.onnx"
    words = ["export", tmp_path / "checkpoint", "--into", "portable_net:build", "--to", "onnx", "--form", "qoperator",
             "-d", tmp_path / "data.npz", "-o", out, "--json"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert sum("stored as uint8" in note for note in json.loads(done.stdout)["notes"]) == len(AT_RISK)
    assert_portable(out, exported[0].model, unsigned=(*AT_RISK, GIVES_FLOATS))
    assert torch.equal(answers(out, images(2, 9)), answers(exported[2], images(2, 9)))


def test_verify_finds_the_same_codes_in_uint8(exported: Any) -> None:
    found = nc.verify(exported[0], exported[2], [images(3, 8)])
    assert found.ok, str(found)
