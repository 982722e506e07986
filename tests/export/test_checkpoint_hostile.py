"""Files that lie: every one of them is a CheckpointError, whatever is wrong with it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from narrowcast.errors import CheckpointError
from narrowcast.export import checkpoint_schema, load, read_description, save
from narrowcast.export.checkpoint_schema import seal
from narrowcast.nn import FLOAT

Quantizer = Callable[..., Any]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv1d(2, 3, 3)
        self.recurrent = nn.GRU(4, 3)
        self.norm = nn.LayerNorm(5)
        self.table = nn.Embedding(7, 4)
        self.again = self.norm
        self.register_buffer("positions", torch.arange(4), persistent=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, quantized: Quantizer) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("hostile") / "original"
    save(quantized(Model()), directory)
    return directory


@pytest.fixture
def damaged(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "damaged")
    return tmp_path / "damaged"


def assert_refused(directory: Path, match: str = "") -> None:
    into = Model()
    types = [type(module) for module in into.modules()]
    with pytest.raises(CheckpointError, match=match) as caught:
        load(directory, into, verify=True)
    assert len(str(caught.value)) < 4000
    assert [type(module) for module in into.modules()] == types


def state_of(directory: Path, *, verify: bool) -> dict[str, torch.Tensor]:
    return load(directory, Model(), verify=verify).state_dict()


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description and seal it again: what an attacker does, no accident."""
    path = directory / "narrowcast.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(seal(description)))


def rewrite_weights(directory: Path, change: Callable[[dict[str, Any]], Any], data: bytes | None = None) -> None:
    """Change the header of the tensor file and make the description vouch for it."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + (raw[8 + length :] if data is None else data))
    vouch(directory, text)


def vouch(directory: Path, header: bytes) -> None:
    raw = (directory / "model.safetensors").read_bytes()
    entry = {
        "bytes": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }
    rewrite(directory, lambda description: description["files"].update({"model.safetensors": entry}))


@given(data=st.data(), name=st.sampled_from(["narrowcast.json", "model.safetensors"]), verify=st.booleans())
def test_flipped_bytes_are_refused_or_change_nothing(original: Path, data: Any, name: str, verify: bool) -> None:
    raw = bytearray((original / name).read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[position] ^= data.draw(st.integers(1, 255))
    _check_corruption(original, name, bytes(raw), verify=verify)


@given(data=st.data(), name=st.sampled_from(["narrowcast.json", "model.safetensors"]), verify=st.booleans())
def test_truncated_and_extended_files_are_refused(original: Path, data: Any, name: str, verify: bool) -> None:
    raw = (original / name).read_bytes()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))] + data.draw(st.binary(max_size=64))
    _check_corruption(original, name, cut, verify=verify)


def _check_corruption(original: Path, name: str, raw: bytes, *, verify: bool) -> None:
    directory = original.with_name("corrupted")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original, directory)
    (directory / name).write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        got, expected = state_of(directory, verify=verify), state_of(original, verify=False)
        assert got.keys() == expected.keys()
        weights_were_checked = verify or name == "narrowcast.json"
        for key in expected if weights_were_checked else ():
            assert got[key].dtype == expected[key].dtype and torch.equal(got[key], expected[key]), key


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["norm.weight", "first", "Linear", "int8/channel", "float32", ".", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [(*path, key) for key, _ in entries] + [p for key, entry in entries for p in _places(entry, (*path, key))]


@given(data=st.data())
def test_a_forged_description_is_refused_or_harmless(original: Path, data: Any) -> None:
    description = json.loads((original / "narrowcast.json").read_text())
    directory = original.with_name("forged")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original, directory)

    def change(forged: dict[str, Any]) -> None:
        *parents, last = data.draw(st.sampled_from(_places(description)))
        place: Any = forged
        for key in parents:
            place = place[key]
        place[last] = data.draw(_JSON)

    rewrite(directory, change)
    with contextlib.suppress(CheckpointError):
        load(directory, Model())


@given(data=st.data())
def test_a_forged_header_is_refused_or_harmless(original: Path, data: Any) -> None:
    directory = original.with_name("header")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original, directory)

    def change(header: dict[str, Any]) -> None:
        *parents, last = data.draw(st.sampled_from(_places(copy.deepcopy(header))))
        place: Any = header
        for key in parents:
            place = place[key]
        place[last] = data.draw(_JSON | st.integers(0, 2000) | st.sampled_from(["F64", "I8", "F4", "BOOL"]))

    rewrite_weights(directory, change)
    with contextlib.suppress(CheckpointError):
        load(directory, Model())


@pytest.mark.parametrize("missing", ["narrowcast.json", "model.safetensors"])
def test_a_missing_file_is_named(missing: str, damaged: Path) -> None:
    (damaged / missing).unlink()
    assert_refused(damaged, f"{missing}: there is no such file")


def test_a_directory_a_pipe_or_an_absent_place_is_no_checkpoint(damaged: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "there is no such file; pass a directory that nc.save wrote")
    assert_refused(damaged / "narrowcast.json", "narrowcast.json")
    for name in ("narrowcast.json", "model.safetensors"):
        (damaged / name).rename(damaged / "aside")
        os.mkfifo(damaged / name)
        assert_refused(damaged, name)
        (damaged / name).unlink()
        (damaged / "aside").rename(damaged / name)
    assert_refused(Path("\0"), "there is no such file")


@pytest.mark.parametrize("text, message", [
    (b"", "not a valid JSON document"),
    (b"[]", "expected a JSON object, got list"),
    (b"\xff\xfe", "not a valid JSON document"),
    (b"[" * 200_000, "not a valid JSON document"),
    (b'{"version": ' + b"1" * 6000 + b"}", "not a valid JSON document"),
    (b'{"version": NaN}', "NaN is not a JSON number"),
    (b'{"format": "narrowcast", "format": "narrowcast"}', "'format' stands twice"),
    (b"{}", "not a narrowcast checkpoint"),
    (b'{"format": "narrowcast", "version": 3}', "version 3 of the checkpoint format, this narrowcast reads version 2"),
    (b'{"format": "narrowcast", "version": true}', "version True"),
    (b'{"format": "narrowcast", "version": 2}', "fields missing"),
])  # fmt: skip
def test_a_malformed_document_is_refused(text: bytes, message: str, damaged: Path) -> None:
    (damaged / "narrowcast.json").write_bytes(text)
    assert_refused(damaged, message)


def test_a_document_without_end_is_not_read(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (damaged / "narrowcast.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)  # sparse: takes no room
    assert_refused(damaged, "larger than 67,108,864 bytes")


def test_an_edited_document_is_refused(damaged: Path) -> None:
    path = damaged / "narrowcast.json"
    path.write_text(path.read_text().replace('"int8/channel"', '"int8/tensor"', 1))
    assert_refused(damaged, "checksum does not match: damaged or edited")
    with pytest.raises(CheckpointError):
        read_description(damaged)


def forge(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(description: dict[str, Any]) -> None:
        place: Any = description
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


LINEAR = {
    "spec": "int8/channel",
    "shape": [5, 6],
    "activation": FLOAT.to_dict(),
    "bias": True,
}


@pytest.mark.parametrize("change, message", [
    (forge("surprise", value=1), r"unknown \['surprise'\]"),
    (forge("modules", "first", "kind", value="Exec"), "unknown kind 'Exec', expected one of"),
    (forge("modules", "first", "kind", value="__class__"), "unknown kind"),
    (forge("modules", "first", "config", value={}), "Linear cannot be made from its config"),
    (forge("modules", "first", "config", value={**LINEAR, "shape": [5, 10**18]}), "first"),
    (forge("modules", "first", "config", value={**LINEAR, "shape": [5, -6]}), "first"),
    (forge("modules", "first", "config", value={**LINEAR, "shape": [5.0, 6]}), "first"),
    (forge("modules", "first", "config", value={**LINEAR, "shape": [5, 7]}), r"first: Linear of \[5, 6\] in the model"),
    (forge("modules", "first", "config", value={**LINEAR, "spec": "int4/group32"}), r"weight_codes: shape \[5, 3\]"),
    (forge("modules", "first", "config", value={**LINEAR, "spec": "uint8/channel/asym"}), "first"),
    (forge("modules", "first", "config", value={**LINEAR, "bias": False}), r"bias: the checkpoint has this tensor"),
    (forge("modules", "first", "config", value={**LINEAR, "more": 1}), "not one that Linear writes"),
    (forge("modules", "first", value={"same_as": "absent"}), "refers to 'absent', which is not there"),
    (forge("modules", "first", value={"same_as": "first"}), "refers to 'first', which is not there"),
    (forge("modules", "first", value={"same_as": "attention"}), "first: Linear in the model, MultiheadAttention"),
    (forge("modules", "attention.q_proj.weight", value={"same_as": "first"}), "has no such part"),
    (forge("modules", "attention.q_proj", value={"same_as": "first"}), "does not fit the module it lies in"),
    (forge("modules", "attention.oops", value={"same_as": "first"}), "has no such part"),
    (forge("modules", "norm", value={"same_as": "first"}), r"norm: LayerNorm of \[5\] in the model"),
    (forge("modules", "../../etc", value={"same_as": "first"}), "'modules' is malformed"),
    (forge("modules", "nowhere.at.all", value={"same_as": "first"}), r"nowhere\.at\.all: nothing in the model"),
    (forge("modules", "", value={"kind": "FoldedBatchNorm", "config": {"convolution": "x"}}), ""),
    (forge("modules", "recurrent", "config", "shape", "num_layers", value=10**12), "expected at most 100,000"),
    (forge("modules", "recurrent", "config", "shape", "num_layers", value=90_000), "Recurrent cannot be made"),
    (forge("tensors", "norm.weight", "dtype", value="object"), "'tensors' is malformed"),
    (forge("tensors", "norm.weight", "dtype", value=["float32"]), "'tensors' is malformed"),
    (forge("tensors", "norm.weight", "dtype", value="int32"), "has dtype float32, narrowcast.json says int32"),
    (forge("tensors", "norm.weight", "shape", value=[6]), r"has shape \[5\], narrowcast.json says \[6\]"),
    (forge("tensors", "norm.weight", "shape", value=[True]), "'tensors' is malformed"),
    (forge("tensors", "norm.weight", "shape", value=[1 << 60]), "'tensors' is malformed"),
    (forge("tensors", "ghost", value={"dtype": "int8", "shape": [1], "role": "stored"}), r"\['ghost'\] is in one only"),
    (forge("tensors", "positions", "role", value="stored"), ""),
    (forge("tensors", "norm.weight", "role", value="constant"), ""),
    (forge("aliases", "again.weight", value="absent"), "not a second name of a tensor"),
    (forge("aliases", "again.weight", value="norm.bias"), "shares this tensor"),
    (forge("aliases", "norm.weight", value="norm.bias"), "not a second name of a tensor"),
    (forge("files", value={}), "does not list model.safetensors"),
    (forge("files", "../escape", value={"bytes": 1, "sha256": "0" * 64}), "'files' is malformed"),
    (forge("files", "model.safetensors", "bytes", value=5), "expected 5 bytes, got"),
    (forge("files", "model.safetensors", "bytes", value=-5), "'files' is malformed"),
    (forge("files", "model.safetensors", "sha256", value="0" * 64), "SHA-256 .* expected 0000"),
    (forge("files", "model.safetensors", "header_sha256", value="0" * 64), "its header is not the one"),
    (forge("huggingface", value={"class": "os.system", "attention": "sdpa"}), "'huggingface' is malformed"),
    (forge("source_sha256", value="abc"), "'source_sha256' is malformed"),
])  # fmt: skip
def test_a_lie_in_the_description_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, damaged: Path
) -> None:
    rewrite(damaged, change)
    if message:
        assert_refused(damaged, message)
        return
    with contextlib.suppress(CheckpointError):
        load(damaged, Model())


def offsets(name: str, start: int, end: int) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update({"data_offsets": [start, end]})


@pytest.mark.parametrize("change", [
    offsets("norm.weight", 0, 20),
    offsets("norm.weight", 10**9, 10**9 + 20),
    offsets("norm.weight", -20, 0),
    offsets("norm.weight", 20, 0),
    offsets("norm.weight", 2**64, 2**64 + 20),
    lambda header: header["norm.weight"].update({"shape": [2**62, 2**62]}),
    lambda header: header["norm.weight"].update({"dtype": "I32"}),
    lambda header: header["norm.weight"].update({"dtype": "F4", "shape": [40]}),
    lambda header: header["norm.weight"].update({"dtype": "Q"}),
    lambda header: header.pop("norm.weight"),
    lambda header: header.update({"extra": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}),
    lambda header: header.update({"norm.weight": []}),
    lambda header: header.update({"__metadata__": {"a": 1}}),
])  # fmt: skip
def test_a_lie_in_the_tensor_header_is_refused(change: Callable[[dict[str, Any]], Any], damaged: Path) -> None:
    rewrite_weights(damaged, change)
    assert_refused(damaged, "model.safetensors")


@pytest.mark.parametrize(
    "start", [b"", b"\0" * 7, b"\xff" * 8, (100_000_001).to_bytes(8, "little"), b"\x02" + b"\0" * 7]
)
def test_a_tensor_file_without_a_header_is_refused(start: bytes, damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes(start)
    vouch(damaged, start[8:])
    assert_refused(damaged, "model.safetensors")
    (damaged / "model.safetensors").write_bytes(start + b"{}")
    vouch(damaged, b"{}")
    assert_refused(damaged, "model.safetensors")


def test_changed_weights_are_found_when_asked_for(damaged: Path) -> None:
    raw = bytearray((damaged / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(raw)
    assert_refused(damaged, "damaged: copy or save it again")


def test_a_sealed_description_is_the_same_after_sealing_again(original: Path) -> None:
    description = read_description(original)
    assert seal(description) == description
    assert json.loads(checkpoint_schema.to_json(description)) == description
