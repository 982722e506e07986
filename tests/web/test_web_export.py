"""`nc.export.web`: what the page asks and shows, what is refused, and that nothing is left where something fails."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

import torch
from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.errors import CheckpointError, DataError, KernelError, ModelError
from narrowcast.export import PageOptions
from narrowcast.export.web_examples import png
from narrowcast.export.web_options import read_labels, with_folder
from narrowcast.export.web_ports import Port
from narrowcast.export.web_question import question
from narrowcast.export.web_shown import shown

NAMES = ("one", "two", "three", "four", "five")


def facts(folder: Path) -> Any:
    return json.loads((folder / "page.json").read_text(encoding="utf-8"))


def test_a_page_is_complete_and_says_what_could_not_be_tried(models: Any, hollow: Path, tmp_path: Path) -> None:
    int8, float32 = models
    page = nc.export.web(
        int8, tmp_path / "page", reference=float32, runtime=hollow, options=PageOptions(title="Mine", labels=NAMES)
    )
    said = facts(tmp_path / "page")
    assert [model["name"] for model in said["models"]] == ["quantized", "float32"]
    assert [(tmp_path / "page" / model["file"]).stat().st_size for model in said["models"]] == [
        model["bytes"] for model in said["models"]
    ]
    assert said["title"] == "Mine" and said["models"][0]["label"] == "static-int8"
    assert said["ask"]["kind"] == "picture" and (said["ask"]["height"], said["ask"]["layout"]) == (12, "NCHW")
    assert said["show"] == {"kind": "classes", "output": "y", "pool": "none", "labels": list(NAMES)}
    assert {"index.html", "page.css", "page.js", "worker.js", "runtime/ort.wasm.min.mjs"} <= set(page.files)
    assert page.runtime == "1.2.3" and page.parity == {}
    assert "no Node.js" in page.warnings[0]


def test_the_models_of_a_page_answer_as_before(models: Any, hollow: Path, tmp_path: Path) -> None:
    import onnxruntime

    nc.export.web(models[0], tmp_path / "page", runtime=hollow)
    assert facts(tmp_path / "page")["title"] == "int8"
    x = {"x": graphs.normal(2, 3, 12, 12, seed=7)}
    answers = [
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, x)[0]
        for file in (models[0], tmp_path / "page" / "quantized.onnx")
    ]
    np.testing.assert_array_equal(*answers)


def test_samples_become_pictures_with_their_preparation_undone(models: Any, hollow: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), np.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    prepared = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    options = PageOptions(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    nc.export.web(models[0], tmp_path / "page", [prepared], runtime=hollow, options=options)
    assert facts(tmp_path / "page")["ask"]["examples"] == [f"examples/{i}.png" for i in range(1, 7)]
    np.testing.assert_array_equal(decoded((tmp_path / "page" / "examples" / "3.png").read_bytes()), pixels[2])


def decoded(file: bytes) -> Any:
    """The pixels of a PNG file without filters, as `png` writes them."""
    at, data, width = 8, b"", 0
    while at < len(file):
        (length,), kind = struct.unpack(">I", file[at : at + 4]), file[at + 4 : at + 8]
        body = file[at + 8 : at + 8 + length]
        assert struct.unpack(">I", file[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            width, _ = struct.unpack(">II", body[:8])
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(-1, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(-1, width, 3)


def test_grey_pictures_are_written_with_one_channel() -> None:
    assert png(np.zeros((2, 5, 1), np.uint8))[24:26] == bytes([8, 0])


def test_a_page_is_replaced_and_anything_else_is_not(models: Any, hollow: Path, tmp_path: Path) -> None:
    target = tmp_path / "page"
    for title in ("first", "second"):
        nc.export.web(models[0], target, runtime=hollow, options=PageOptions(title=title))
    assert facts(target)["title"] == "second"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"also holds \['notes.txt'\]"):
        nc.export.web(models[0], target, runtime=hollow)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty and not a page of narrowcast"):
        nc.export.web(models[0], tmp_path / "other", runtime=hollow)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node_modules", "other", "page"]


def test_without_npm_the_error_names_both_ways_out(models: Any, hollow: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"no npm on this machine; install Node\.js.*--runtime-from"):
        nc.export.web(models[0], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_an_npm_that_fails_is_quoted(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network is down' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(KernelError, match="failed: npm error network is down; install"):
        nc.export.web(models[0], tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_folder_without_the_runtime_is_refused(models: Any, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"no onnxruntime-web: ort\.wasm\.min\.mjs"):
        nc.export.web(models[0], tmp_path / "page", runtime=tmp_path)
    assert not (tmp_path / "page").exists()


def test_models_of_different_inputs_are_not_put_side_by_side(models: Any, hollow: Path, tmp_path: Path) -> None:
    onnx.save(graphs.one("MatMul", graphs.normal(4, 3), ["batch", 4]), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="give the model it was made of"):
        nc.export.web(models[0], tmp_path / "page", reference=tmp_path / "other.onnx", runtime=hollow)
    assert not (tmp_path / "page").exists()


def test_a_place_that_cannot_be_written_is_refused(models: Any, hollow: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place, words in (("file", "there is a file"), ("file/page", "cannot be written")):
        with pytest.raises(CheckpointError, match=words):
            nc.export.web(models[0], tmp_path / place, runtime=hollow)


def test_a_wrong_number_of_labels_is_refused(models: Any, hollow: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 labels, and the model's output 'y' has 5 classes"):
        nc.export.web(models[0], tmp_path / "page", runtime=hollow, options=PageOptions(labels=("a", "b")))


def test_a_float_model_alone_is_warned_about(models: Any, hollow: Path, tmp_path: Path) -> None:
    page = nc.export.web(models[1], tmp_path / "page", runtime=hollow)
    assert any("nothing in the model is quantized" in warning for warning in page.warnings)


# --- what is asked


def asked(*ports: Port, **options: Any) -> Any:
    return question(list(ports), PageOptions(**options)).ask


def test_pictures_are_known_by_their_axes() -> None:
    assert asked(Port("x", "float32", (None, 3, 32, 48)))["width"] == 48
    last = asked(Port("x", "uint8", (1, 32, 48, 1)))
    assert (last["layout"], last["channels"], last["divide"]) == ("NHWC", 1, 1)
    assert asked(Port("x", "float32", (None, 3, None, None)), side=20)["height"] == 20
    assert asked(Port("x", "float32", (None, 16, 32, 32)))["kind"] == "numbers"
    assert asked(Port("x", "float32", (8, 3, 32, 32)))["kind"] == "numbers"
    with pytest.raises(DataError, match="--image-size"):
        asked(Port("x", "float32", (None, 3, None, None)))
    with pytest.raises(DataError, match="mean has 2 numbers"):
        asked(Port("x", "float32", (None, 3, 32, 32)), mean=(0.1, 0.2))


def test_a_few_numbers_get_a_field_each_and_many_a_box() -> None:
    assert asked(Port("x", "float32", (None, 4)))["fields"] is True
    assert asked(Port("x", "float32", (None, 400)))["fields"] is False
    several = asked(Port("x", "float32", (None, 2)), Port("state", "float32", (2, 1, 3)))
    assert several["fields"] is False and np.shape(several["example"]["state"]) == (2, 1, 3)


def test_token_ids_become_a_text_where_there_is_a_vocabulary(tmp_path: Path) -> None:
    ids, mask = Port("input_ids", "int64", (None, None)), Port("attention_mask", "int64", (None, None))
    plain = question([ids, mask], PageOptions())
    assert plain.ask["kind"] == "numbers" and "--tokenizer" in plain.notes[0]
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 1, "b": 2}))
    text = question([ids, mask], PageOptions(tokenizer=tmp_path))
    assert text.ask["tokens"] == "characters" and text.ask["mask"]["name"] == "attention_mask"
    assert text.tokens == ("", "a", "b")


def test_a_type_that_a_page_cannot_hand_over_is_refused() -> None:
    from narrowcast.export.web_ports import ports

    entry = type("Entry", (), {"name": "x", "type": "tensor(string)", "shape": [1]})
    with pytest.raises(ModelError, match=r"'x' is a tensor\(string\)"):
        ports([entry])


# --- what is shown


def text_question(tmp_path: Path) -> Any:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 1, "b": 2}))
    return question([Port("ids", "int64", (1, None))], PageOptions(tokenizer=tmp_path))


def test_what_is_shown_follows_from_the_shape_of_the_output(tmp_path: Path) -> None:
    picture = question([Port("x", "float32", (1, 3, 8, 8))], PageOptions())
    numbers = question([Port("x", "float32", (1, 4))], PageOptions())
    text = text_question(tmp_path)
    plain = PageOptions()

    def kind(asked: Any, shape: tuple[int, ...], options: PageOptions = plain) -> tuple[str, str]:
        found = shown(asked, shape, options, "y")
        return found["kind"], found["pool"]

    assert kind(picture, (1, 10)) == kind(picture, (1, 10, 1, 1)) == ("classes", "none")
    assert kind(picture, (1, 1)) == kind(picture, (1, 4, 9)) == ("values", "none")
    assert kind(numbers, (1, 3)) == ("values", "none")
    assert kind(numbers, (1, 3), PageOptions(labels=("a", "b", "c"))) == ("classes", "none")
    assert kind(text, (1, 7, 384)) == ("likeness", "mean")
    assert kind(text, (1, 384)) == ("likeness", "none")
    assert kind(text, (1, 2)) == ("classes", "none")
    assert kind(text, (1, 7, 3)) == ("classes", "last") and shown(text, (1, 7, 3), plain, "y")["labels"] == [
        "",
        "a",
        "b",
    ]
    with pytest.raises(DataError, match="likeness compares two texts"):
        kind(picture, (1, 10), PageOptions(show="likeness"))


# --- what is said of it


def test_labels_are_lines_lists_or_objects(tmp_path: Path) -> None:
    files = {"a.txt": "cat\ndog\n", "b.json": '["cat", "dog"]', "c.json": '{"1": "dog", "0": "cat"}',
             "d.json": '[["n01", "cat"], ["n02", "dog"]]'}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert read_labels(tmp_path / name) == ("cat", "dog"), name
    for name, content in {"e.json": "{", "f.json": '{"x": "dog"}', "g.json": "3", "h.txt": "\n"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_labels(tmp_path / name)


def test_a_hugging_face_folder_says_what_the_options_leave_open(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.25]}')
    (tmp_path / "config.json").write_text('{"id2label": {"0": "cat", "1": "dog"}}')
    found = with_folder(PageOptions(mean=(0.1,)), tmp_path)
    assert (found.mean, found.std, found.labels, found.tokenizer) == ((0.1,), (0.25,), ("cat", "dog"), None)
    (tmp_path / "config.json").write_text('{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}')
    assert with_folder(PageOptions(), tmp_path).labels == ()


@pytest.mark.parametrize("options", [{"show": "poems"}, {"std": (0.0,)}])
def test_options_that_mean_nothing_are_refused(options: Any) -> None:
    with pytest.raises(DataError):
        PageOptions(**options)
