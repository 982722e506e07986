from __future__ import annotations

import json
import struct
import zipfile

import numpy as np
import pytest


def safetensors(path, header, body=b"", *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


def test_tensors_of_a_safetensors_file_are_listed(cli, weights):
    found = cli("inspect", weights, "--json").json
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors["fc.weight"]["shape"] == [6, 10]
    assert tensors["fc.weight"]["dtype"] == "float32"
    assert tensors["fc.weight"]["bytes"] == 240
    answer = cli("inspect", weights)
    assert "fc.weight" in answer.out and "6x10" in answer.out and "3 tensors" in answer.out


def test_top_shows_the_largest(cli, weights):
    out = cli("inspect", weights, "--top", "1").out
    assert "fc.weight" in out and "fc.bias" not in out


def test_numpy_files_are_listed_without_loading(cli, tmp_path):
    np.savez_compressed(tmp_path / "data.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.arange(3))
    found = {tensor["name"]: tensor for tensor in cli("inspect", tmp_path / "data.npz", "--json").json["tensors"]}
    assert found["images"]["shape"] == [3, 4, 4, 3]
    np.save(tmp_path / "one.npy", np.ones((2, 2), np.float16))
    assert "float16" in cli("inspect", tmp_path / "one.npy").out


def test_object_arrays_are_refused(refused, tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    assert "Python objects" in refused("inspect", tmp_path / "bad.npy")


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_with_the_remedy(refused, tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = refused("inspect", tmp_path / name)
    assert "pickle" in message and "safetensors" in message


def test_a_directory_with_pickles_only_is_refused(refused, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle" in refused("inspect", tmp_path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        (b"", b"", None),
        (b"{}", b"", 2**63),
        (b"{}", b"", 50),
        (b"not json", b"", None),
        (b"[]", b"", None),
        (b"[" * 5000, b"", None),
        (b'{"a": 1, "a": 2}', b"", None),
        ({"a": F32}, b"", None),  # truncated
        ({"a": F32}, bytes(12), None),  # more bytes than tensors
        ({"a": F32, "b": F32}, bytes(8), None),  # overlap
        ({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12), None),  # gap
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), None),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), None),
        ({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(8), None),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), None),
        ({"a": {**F32, "shape": "2"}}, bytes(8), None),
        ({"a": {**F32, "dtype": "F99"}}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
        ({"a": [1]}, bytes(8), None),
        ({"__metadata__": {"x": 1}}, b"", None),
    ],
)
def test_hostile_safetensors_headers_are_refused(refused, tmp_path, header, body, length):
    path = safetensors(tmp_path / "bad.safetensors", header, body, length=length)
    assert "bad.safetensors" in refused("inspect", path)


def test_truncated_numpy_archives_are_refused(refused, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:600])
    refused("inspect", tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x10\x00garbage")
    refused("inspect", tmp_path / "lie.npz")


def test_onnx_weights_and_operators_are_listed(cli, tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(5, np.int64), "inner"))
    nodes = [constant, helper.make_node("MatMul", ["x", "w"], ["y"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, [1, 4])], [value("y", 1, [1, 3])], initializer=[weight])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    found = cli("inspect", tmp_path / "m.onnx", "--json").json
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors["w"]["shape"] == [4, 3] and tensors["w"]["bytes"] == 48
    assert tensors["c"]["dtype"] == "int64"
    assert "1 MatMul" in found["facts"]["operators"]


@pytest.mark.parametrize(
    "content", [b"", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 40, b"garbage that is no model at all", b"\x3a\x00"]
)
def test_what_is_no_onnx_model_is_refused(refused, tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    assert "bad.onnx" in refused("inspect", tmp_path / "bad.onnx")


@pytest.mark.parametrize("name", ["missing.safetensors", "missing", "missing.onnx"])
def test_missing_files_are_refused(refused, tmp_path, name):
    assert "does not exist" in refused("inspect", tmp_path / name)


def test_unknown_files_and_empty_directories_are_refused(refused, tmp_path):
    assert "holds no safetensors" in refused("inspect", tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    assert ".md" in refused("inspect", tmp_path / "notes.md")


def test_an_index_may_not_point_outside_its_directory(refused, tmp_path, weights):
    model = tmp_path / "model"
    model.mkdir()
    index = {"weight_map": {"fc.weight": "../tiny.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a file in" in refused("inspect", model)


def test_errors_are_json_too_where_json_was_asked_for(cli, tmp_path):
    answer = cli("inspect", tmp_path / "nothing.npz", "--json")
    assert answer.code == 2
    assert "does not exist" in answer.json["error"]
