"""`narrowcast quantize model.onnx -o small.onnx` and what the other commands say of ONNX files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from tests.onnx_files import graphs

from narrowcast.cli.app import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(graphs.residual_network(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=graphs.normal(64, 3, 12, 12, seed=3))
    return tmp_path


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_quantize_writes_an_onnx_file_that_onnx_runtime_runs(folder: Path) -> None:
    out = folder / "small.onnx"
    done = run("quantize", folder / "model.onnx", "-r", "static-int8", "-d", folder / "data.npz", "-o", out, "--json")
    assert done.exit_code == 0, done.output + str(done.exception)
    report = json.loads(done.stdout)["report"]
    assert {row["kernel"] for row in report["layers"]} == {"QLinearConv", "QGemm"}
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": graphs.normal(2, 3, 12, 12)})[0].shape == (2, 5)


def test_a_recipe_file_has_several_observers_watch_and_the_report_compares_them(folder: Path) -> None:
    recipe = folder / "recipe.toml"
    recipe.write_text('[[rule]]\nweight = "int8"\ninput = "uint8/tensor static:best(minmax, percentile(99.5))"\n')
    done = run("quantize", folder / "model.onnx", "-r", recipe, "-d", folder / "data.npz", "-o", folder / "small.onnx",
               "--json")  # fmt: skip
    assert done.exit_code == 0, done.output + str(done.exception)
    rows = json.loads(done.stdout)["report"]["layers"]
    assert all(" by " in row["input"] and row["input"].count(" dB") == 2 for row in rows)


def test_plan_lists_the_layers_of_an_onnx_file(folder: Path) -> None:
    done = run("plan", folder / "model.onnx", "-r", "dynamic-int8", "--json")
    assert done.exit_code == 0, done.output
    assert [row["layer"] for row in json.loads(done.stdout)["layers"]] == ["stem", "depthwise", "head"]


def test_the_output_of_an_onnx_model_must_be_an_onnx_file(folder: Path) -> None:
    done = run("quantize", folder / "model.onnx", "-r", "weight-int8", "-o", folder / "small")
    assert done.exit_code == 2 or done.exception is not None
    assert not (folder / "small").exists()


def test_inspect_tells_the_kernel_of_every_product_and_why_it_is_float(folder: Path) -> None:
    out = folder / "small.onnx"
    assert run("quantize", folder / "model.onnx", "-r", "weight-int8", "-o", out, "--quiet").exit_code == 0
    nodes = json.loads(run("inspect", out, "--kernels", "--json").stdout)["nodes"]
    assert [node["kernel"] for node in nodes] == ["FusedConv", "FusedConv", "MatMulNBits"]
    assert not any(node["integer"] for node in nodes) and {node["bits"] for node in nodes} == {8}
    assert "its input is float" in nodes[0]["reason"] and "dequantized" in nodes[0]["reason"]
    floats = json.loads(run("inspect", folder / "model.onnx", "--kernels", "--json").stdout)["nodes"]
    assert {node["reason"] for node in floats} == {"its weight is a float: no rule quantized it"}
