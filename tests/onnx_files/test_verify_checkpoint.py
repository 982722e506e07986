"""Verifying a checkpoint on disk against the ONNX file that was exported from it: by call and by command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from tests.onnx_files.test_verify import with_other_code

import narrowcast as nc
from narrowcast.cli.app import app
from narrowcast.errors import CheckpointError

PROJECT = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.conv2, self.head = torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.conv2(self.bn1(self.conv1(x)).relu()).relu().mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net().eval()
"""
FACTORY = "verified_project:build"


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its export, other data; all by commands."""
    place = tmp_path_factory.mktemp("verified")
    (place / "verified_project.py").write_text(PROJECT)
    for name, seed in (("calibration", 1), ("test", 2)):
        x = torch.randn(24, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
        np.savez(place / f"{name}.npz", x=x.numpy())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in (("quantize", FACTORY, "-r", "static-int8", "-d", "calibration.npz", "-o", "int8", "-q"),
                      ("export", "int8", "--into", FACTORY, "--to", "onnx", "-d", "calibration.npz", "-o",
                       "int8.onnx")):  # fmt: skip
            done = run(*words)
            assert done.exit_code == 0, done.output
    with_other_code(place / "int8.onnx", place / "faulty.onnx", "conv2")
    return place


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def data() -> list[Any]:
    return [torch.from_numpy(np.load("test.npz")["x"])]


@pytest.mark.parametrize("sides", [("int8", "int8.onnx"), ("int8.onnx", "int8")])
def test_the_command_finds_a_checkpoint_and_its_file_within_their_bounds(sides: tuple[str, str]) -> None:
    done = run("verify", *sides, "--into", FACTORY, "-d", "test.npz", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ok"] and [row["layer"] for row in said["layers"]] == ["conv1", "conv2", "head"]
    assert any(f"was loaded into a copy of {FACTORY}" in note for note in said["notes"])


def test_the_command_names_the_layer_of_a_file_that_was_changed() -> None:
    done = run("verify", "int8", "faulty.onnx", "--into", FACTORY, "-d", "test.npz", "--json")
    assert done.exit_code == 1, done.output
    said = json.loads(done.stdout)
    assert said["first_beyond"] == "conv2" and not said["ok"]
    beyond = [row for row in said["layers"] if row["verdict"] == "BEYOND"]
    assert [row["layer"] for row in beyond] == ["conv2"] and "1 of 576 in weight codes" in beyond[0]["reason"]


def test_the_call_takes_an_architecture_a_loaded_module_and_the_float_model_with_a_tolerance() -> None:
    space: dict[str, Any] = {}
    exec(PROJECT, space)
    into = space["build"]()
    assert nc.verify("int8", "int8.onnx", data(), into=into).ok
    assert not hasattr(into.conv1, "quantized_weights"), "the architecture is copied, and stays as it was"
    assert nc.verify(nc.load("int8", space["build"]()), "int8.onnx", data()).ok
    assert nc.verify(into, "int8", data(), tolerance="15dB").ok
    assert nc.verify(into, "int8.onnx", data(), tolerance="15dB").ok


@pytest.mark.parametrize("sides", [("int8", "int8.onnx"), ("int8.onnx", "int8")])
def test_a_checkpoint_without_architecture_beside_a_file_says_what_to_give(sides: tuple[str, str]) -> None:
    with pytest.raises(CheckpointError, match=r"int8, is a checkpoint without an architecture.*into="):
        nc.verify(*sides, data())
    done = run("verify", *sides, "-d", "test.npz")
    assert done.exit_code == 2 and "--into" in " ".join(done.stderr.split())
