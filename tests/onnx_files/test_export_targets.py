"""`narrowcast export`: what it writes, and what it refuses before anything is written."""

from __future__ import annotations

import json
from collections import Counter
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
from narrowcast.export import TARGETS

FACTORY = """
import torch


def build():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(400, 5)]
    return torch.nn.Sequential(*layers).eval()
"""


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 and a static-int8 ONNX file, and data."""
    place = tmp_path_factory.mktemp("exporting")
    onnx.save(graphs.residual_network(), place / "model.onnx")
    np.savez(place / "data.npz", x=graphs.normal(32, 3, 12, 12, seed=3))
    done = run(
        "quantize", place / "model.onnx", "-r", "static-int8", "-d", place / "data.npz", "-o", place / "int8.onnx"
    )
    assert done.exit_code == 0, done.output
    return place


def answers(*files: Path) -> list[Any]:
    x = {"x": graphs.normal(3, 3, 12, 12, seed=8)}
    return [ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, x)[0] for file in files]


def refused(folder: Path, *words: Any) -> str:
    """The message of a command that must fail and leave the folder as it was."""
    before = sorted(folder.iterdir())
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert sorted(folder.iterdir()) == before
    return " ".join(done.stderr.split())


def test_onnx_files_pass_in_both_forms(folder: Path) -> None:
    for form in ("qdq", "qoperator"):
        done = run(
            "export", folder / "int8.onnx", "--to", "onnx", "--form", form, "-o", folder / f"{form}.onnx", "--json"
        )
        assert done.exit_code == 0, done.output
        said = json.loads(done.stdout)
        assert said["files"] == {f"{form}.onnx": (folder / f"{form}.onnx").stat().st_size}
        assert said["facts"]["products in integers"].startswith("3 of 3")
    np.testing.assert_array_equal(*answers(folder / "qdq.onnx", folder / "qoperator.onnx"))
    operators = Counter(node.op_type for node in onnx.load(folder / "qoperator.onnx").graph.node)
    assert operators["QLinearConv"] == 2 and operators["QGemm"] == 1


def test_quantize_writes_the_form_that_is_asked_for(folder: Path) -> None:
    out = folder / "direct.onnx"
    done = run(
        "quantize",
        folder / "model.onnx",
        "-r",
        "static-int8",
        "-d",
        folder / "data.npz",
        "-o",
        out,
        "--form",
        "qoperator",
    )
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(*answers(folder / "int8.onnx", out))
    assert "QLinearConv" in {node.op_type for node in onnx.load(out).graph.node}
    assert any(prop.key == "narrowcast.recipe" for prop in onnx.load(out).metadata_props)


def test_the_form_of_a_directory_is_no_choice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "form_project.py").write_text(FACTORY)
    message = refused(
        folder, "quantize", "form_project:build", "-r", "weight-int8", "-o", folder / "out", "--form", "qoperator"
    )
    assert "--form" in message


@pytest.mark.parametrize("platform", ["arm", "amd64"])
def test_ort_files_answer_as_the_onnx_file_and_list_their_operators(folder: Path, platform: str) -> None:
    out = folder / f"{platform}.ort"
    done = run("export", folder / "int8.onnx", "--to", "ort", "--platform", platform, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    assert out.read_bytes()[4:8] == b"ORTM"
    np.testing.assert_array_equal(*answers(folder / "int8.onnx", out))
    operators = (folder / f"{platform}.required_operators.config").read_text()
    assert "QLinearConv" in operators and "QGemm" in operators and str(folder) not in operators
    assert set(json.loads(done.stdout)["files"]) == {out.name, f"{platform}.required_operators.config"}


def test_a_checkpoint_is_exported_with_its_architecture_and_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
    monkeypatch.chdir(folder)
    (folder / "export_project.py").write_text(FACTORY)
    data = ("-d", folder / "data.npz")
    assert (
        run("quantize", "export_project:build", "-r", "static-int8", *data, "-o", folder / "small", "-q").exit_code == 0
    )
    into = ("--into", "export_project:build")
    done = run("export", folder / "small", "--to", "onnx", *into, *data, "-o", folder / "torch.onnx", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["facts"]["products in integers"].startswith("2 of 2")
    assert "names its data" not in refused(
        folder, "export", folder / "small", "--to", "onnx", *into, "-o", folder / "b.onnx"
    )


def test_an_unquantized_model_is_exported_with_a_warning(folder: Path) -> None:
    done = run("export", folder / "model.onnx", "--to", "onnx", "-o", folder / "same.onnx", "--quiet")
    assert done.exit_code == 0 and "nothing in the model is quantized" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "tflite", "-o", "x.tflite"), "--to 'tflite' is not known; there are onnx, ort, web"),
        (("--to", "onnx", "-o", "x.ort"), "name one that ends in .onnx"),
        (("--to", "ort", "-o", "missing/x.ort"), "in a folder that exists"),
        (("--to", "onnx", "-o", "x.onnx", "--form", "tensor"), "qdq or qoperator"),
        (("--to", "onnx", "-o", "x.onnx", "--labels", "names.txt"), "labels means nothing to onnx; it is for web"),
        (("--to", "web", "-o", "x", "--form", "qdq"), "form means nothing to web; it is for onnx and ort"),
        (("--to", "ort", "-o", "x.ort", "--platform", "z80"), "optimizes for arm or amd64"),
        (("--to", "web", "-o", ".", "--show", "poems"), "is not empty and not a page"),
        (("--to", "web", "-o", "x", "--show", "poems"), "a page shows classes, likeness, values"),
        (("--to", "web", "-o", "x", "--labels", "none.txt"), "none.txt cannot be read"),
        (("--to", "web", "-o", "x", "--runtime-from", "."), "no onnxruntime-web"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert message in refused(folder, "export", folder / "int8.onnx", *words)


def test_a_corrupt_model_is_refused_by_every_target(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x01garbage")
    for target in TARGETS.values():
        assert "broken.onnx" in refused(tmp_path, "export", tmp_path / "broken.onnx", "--to", target.name,
                                        "-o", tmp_path / f"x{target.ending}")  # fmt: skip


def test_the_help_lists_every_target() -> None:
    text = " ".join(run("export", "--help").output.replace("│", " ").split())
    assert all(f"{target.name}: {target.help}" in text for target in TARGETS.values())
