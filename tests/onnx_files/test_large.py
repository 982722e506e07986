"""Models that do not fit into memory: weights stay in files while they are read, quantized and written."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ir = pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.models import onnx_file, onnx_large

X = graphs.normal(5, 300, seed=4)


def stack(folder: Path, *, opset: int = 17) -> Path:
    """Three products of 300 x 300, whose weights lie in a file beside the model."""
    nodes, constants = [], []
    for index in range(3):
        nodes.append(onnx.helper.make_node("MatMul", [f"x{index}", f"layer{index}.weight"], [f"x{index + 1}"]))
        constants.append(graphs.constant(graphs.normal(300, 300, seed=index) / 17, f"layer{index}.weight"))
    model = graphs.model(nodes, [graphs.value("x0", ["n", 300])], [graphs.value("x3", ["n", 300])], constants, opset)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def answer(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x0": X})[0]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Everything above 100 kB counts as large; returns where temporary files go."""
    monkeypatch.setattr(onnx_file, "LARGE", 100_000)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize("recipe", ["weight-int8", "weight-int4", "dynamic-int8", "fp16", "static-int8"])
def test_a_large_model_gives_the_same_file_as_one_in_memory(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = stack(tmp_path), [X] if recipe == "static-int8" else None
    nc.save(nc.quantize(path, recipe, data, progress=False), tmp_path / "expected.onnx")
    monkeypatch.setattr(onnx_file, "LARGE", 50_000)
    result = nc.quantize(path, recipe, data, progress=False)
    codes = [t for t in onnx_file.tensors_of(result.model.graph) if t.nbytes >= onnx_large.SMALLEST_SPOOLED]
    assert codes or recipe == "weight-int4"
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in codes)
    nc.save(result, tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").is_file() and (tmp_path / "large.onnx").stat().st_size < 20_000
    assert np.array_equal(answer(tmp_path / "large.onnx"), answer(tmp_path / "expected.onnx"))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "large.onnx").graph.initializer}
    for tensor in onnx.load(tmp_path / "expected.onnx").graph.initializer:
        assert np.array_equal(stored[tensor.name], onnx.numpy_helper.to_array(tensor))


def test_temporary_files_go_with_the_result(small_memory: Path, tmp_path: Path) -> None:
    result = nc.quantize(stack(tmp_path), "weight-int8", [X], progress=False)
    assert list(small_memory.iterdir())
    del result
    gc.collect()
    assert not list(small_memory.iterdir())


def test_the_weights_of_the_model_are_unmapped_after_use(small_memory: Path, tmp_path: Path) -> None:
    result = nc.quantize(stack(tmp_path), {"rule": [{"layers": "layer1", "weight": "int8"}]}, progress=False)
    left = [t for t in onnx_file.tensors_of(result.model.graph) if isinstance(t, ir.ExternalTensor)]
    assert left and all(tensor.raw is None for tensor in left)


def test_the_message_of_a_file_is_what_onnx_would_write(tmp_path: Path) -> None:
    for index, recipe in enumerate(("static-int8", "weight-int4", "fp16")):
        result = nc.quantize(graphs.residual_network(), recipe, [graphs.normal(4, 3, 12, 12)], progress=False)
        nc.save(result, tmp_path / f"{index}.onnx")
        written, expected = onnx.load(tmp_path / f"{index}.onnx"), ir.to_proto(result.model.graph)
        onnx.checker.check_model(written)
        by_name = {t.name: onnx.numpy_helper.to_array(t) for t in expected.graph.initializer}
        assert len(written.graph.initializer) == len(by_name) > 0
        for tensor in written.graph.initializer:
            assert np.array_equal(onnx.numpy_helper.to_array(tensor), by_name[tensor.name])
        for field in ("node", "input", "output"):
            assert getattr(written.graph, field) == getattr(expected.graph, field)
        assert written.opset_import == expected.opset_import


def test_lengths_are_written_as_protobuf_has_them() -> None:
    assert [onnx_file._varint(n).hex() for n in (0, 1, 127, 128, 300, 2**31)] == [
        "00", "01", "7f", "8001", "ac02", "8080808008",
    ]  # fmt: skip


def test_a_large_model_of_an_old_opset_is_converted_without_its_weights(small_memory: Path, tmp_path: Path) -> None:
    path = stack(tmp_path, opset=11)
    result = nc.quantize(path, "weight-int8", [X], progress=False)
    assert any("opset 11 was converted to 13" in note for note in result.report.notes)
    nc.save(result, tmp_path / "small.onnx")
    expected, got = answer(path), answer(tmp_path / "small.onnx")
    assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected)


def test_a_failed_save_leaves_what_was_there(
    small_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = nc.quantize(stack(tmp_path), "weight-int8", progress=False)
    (tmp_path / "out").mkdir()
    nc.save(result, tmp_path / "out" / "small.onnx")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"small.onnx", "small.onnx.data"}

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx_file.ir, "save", refuse)
    with pytest.raises(nc.CheckpointError, match="no space left"):
        nc.save(result, tmp_path / "out" / "small.onnx")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
