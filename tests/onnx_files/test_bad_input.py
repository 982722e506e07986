"""Damaged and hostile ONNX files: a clear error, nothing written, nothing read outside the model's folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from benchmarks import onnx_fuzz, onnx_mutations
from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.errors import ModelError, NarrowcastError


def saved(model: Any, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def with_external_weight(folder: Path, location: str, **entries: int) -> Path:
    model = graphs.one("MatMul", graphs.normal(64, 8), ["n", 64])
    (tensor,) = model.graph.initializer
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return saved(model, folder / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"garbage that is no model at all", b"\x3a\x00"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        nc.plan(tmp_path / "bad.onnx", "weight-int8")
    with pytest.raises(ModelError, match="is not a file"):
        nc.plan(tmp_path / "missing.onnx", "weight-int8")


def test_weights_outside_the_file_are_read_from_its_folder(tmp_path: Path) -> None:
    result = nc.quantize(with_external_weight(tmp_path, "weights.bin"), "weight-int8", progress=False)
    assert result.report.layers[0].outcome == "quantized"
    nc.save(result, tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 2500


@pytest.mark.parametrize(
    ("location", "entries", "words"),
    [("../secret.bin", {}, "outside the model's folder"), ("/etc/hostname", {}, "outside the model's folder"),
     ("missing.bin", {}, "no such file"), ("weights.bin", {"offset": 64}, "which has 2048"),
     ("weights.bin", {"length": 10}, "which has 2048"), ("link.bin", {}, "outside the model's folder")],
)  # fmt: skip
def test_data_elsewhere_or_too_short_is_refused(location: str, entries: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(ModelError, match=words):
        nc.plan(with_external_weight(folder, location, **entries), "weight-int8")


def test_a_cycle_and_a_loose_end_are_refused(tmp_path: Path) -> None:
    model = graphs.residual_network()
    model.graph.node[0].input[0] = "e"
    with pytest.raises(ModelError, match="nothing before it gives"):
        nc.plan(saved(model, tmp_path / "cycle.onnx"), "weight-int8")
    model = graphs.residual_network()
    del model.graph.node[-1]
    with pytest.raises(ModelError, match="no node gives the output 'y'"):
        nc.plan(saved(model, tmp_path / "loose.onnx"), "weight-int8")


def test_weights_that_are_not_finite_are_named() -> None:
    weight = graphs.normal(40, 12)
    weight[3, 4] = np.nan
    with pytest.raises(ModelError, match=r"layer 'layer'.*\[4, 3\] is nan"):
        nc.quantize(graphs.one("MatMul", weight, ["n", 40]), "weight-int8", progress=False)


def test_three_hundred_mutated_files_end_in_a_plan_or_a_clear_error(tmp_path: Path) -> None:
    good, chance = graphs.residual_network().SerializeToString(), random.Random(0)
    planned = 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(chance.choice((1, 3, 20))):
            place = chance.randrange(len(content))
            if chance.random() < 0.7:
                content[place] = chance.randrange(256)
            else:
                del content[place : place + chance.randrange(1, 50)]
        (tmp_path / "mutated.onnx").write_bytes(bytes(content))
        try:
            nc.plan(tmp_path / "mutated.onnx", "weight-int8")
            planned += 1
        except NarrowcastError:
            continue
    assert 0 < planned < 300


def test_a_weight_in_a_file_with_two_names_is_refused(tmp_path: Path) -> None:
    path = with_external_weight(tmp_path, "weights.bin")
    (tmp_path / "other.bin").hardlink_to(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="2 hard links"):
        nc.plan(path, "weight-int8")


def test_a_node_that_onnx_does_not_define_so_is_named(tmp_path: Path) -> None:
    model = graphs.residual_network()
    model.graph.node[0].attribute[0].CopyFrom(onnx.helper.make_attribute("pads", 0.5))
    with pytest.raises(ModelError, match=r"\(Conv\) is not what ONNX defines: .*pads"):
        nc.plan(saved(model, tmp_path / "model.onnx"), "weight-int8")


def test_files_with_mutated_fields_end_in_a_plan_or_a_clear_error_and_nothing_is_written(tmp_path: Path) -> None:
    folder, models, planned = onnx_fuzz.prepare_folder(tmp_path), onnx_mutations.seeds(), 0
    path = folder / "model.onnx"
    path.touch()
    present = sorted(tmp_path.rglob("*"))
    for index in range(120):
        chance = random.Random(index)
        path.write_bytes(onnx_mutations.mutated(chance.choice(models), chance)[0])
        try:
            nc.plan(path, "weight-int8")
            planned += 1
        except NarrowcastError as error:
            assert len(str(error)) > 20
    assert 0 < planned < 120 and sorted(tmp_path.rglob("*")) == present


@pytest.mark.parametrize("index", [935, 1561, 1906])
def test_files_that_once_ended_in_a_foreign_error_are_taken_or_refused(index: int, tmp_path: Path) -> None:
    models, chance = onnx_mutations.seeds(), random.Random(index)
    path = onnx_fuzz.prepare_folder(tmp_path) / "model.onnx"
    path.write_bytes(onnx_mutations.mutated(chance.choice(models), chance)[0])
    assert not onnx_fuzz.one(path, "weight-int8")[0].startswith("foreign")
