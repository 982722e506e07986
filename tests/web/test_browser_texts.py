"""Pages of models that read texts, in a headless browser; and what a page says where something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from onnx import TensorProto, helper
from tests.onnx_files import graphs
from tests.web.browser import Browser, browser, served, why_not

import narrowcast as nc
from narrowcast.export import PageOptions
from narrowcast.export.web_examples import png

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
DONE = "document.body.dataset.state === 'timed'"
FAILURE = "return document.getElementById('failure').textContent;"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def writer(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A page of a model whose next token follows from the last one, with a byte-level vocabulary; and the tokenizer."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from tests.web.tokenizer_cases import gpt2

    folder = tmp_path_factory.mktemp("writer")
    tokenizer = gpt2()
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
             helper.make_node("MatMul", ["rows", "head"], ["logits"])]  # fmt: skip
    constants = [graphs.constant(graphs.normal(size, 32, seed=1), "table"),
                 graphs.constant(graphs.normal(32, size, seed=2), "head")]  # fmt: skip
    ids = graphs.value("input_ids", ["batch", "tokens"], TensorProto.INT64)
    onnx.save(graphs.model(nodes, [ids], [graphs.value("logits", ["batch", "tokens", size])], constants),
              folder / "model.onnx")  # fmt: skip
    nc.save(nc.quantize(str(folder / "model.onnx"), "weight-int8", progress=False), folder / "int8.onnx")
    options = PageOptions(tokenizer=folder, stop=(0,))
    page = nc.export.web(folder / "int8.onnx", folder / "page", reference=folder / "model.onnx", runtime=runtime,
                         options=options)  # fmt: skip
    return page, tokenizer


def greedy(file: Path, ids: list[int], count: int) -> list[int]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for _ in range(count):
        (scores,) = session.run(None, {"input_ids": np.array([ids])})
        ids = [*ids, int(scores[0, -1].argmax())]
        if ids[-1] == 0:
            break
    return ids


def test_a_decoder_writes_on_what_onnx_runtime_would_write(window: Browser, writer: Any) -> None:
    page, tokenizer = writer
    assert page.facts["show"]["kind"] == "continuation" and page.facts["ask"]["limit"] == 512
    with served(page.path) as (address, _):
        window.open(address)
        window.wait(DONE)
        window.run("""document.getElementById("text-1").value = "It's café 東京";
            document.getElementById("count").value = 9; document.getElementById("write").click();""")
        window.wait("!document.getElementById('write').disabled && " + DONE)
        for model in ("quantized", "float32"):
            ids = greedy(page.path / f"{model}.onnx", tokenizer.encode("It's café 東京").ids, 9)
            shown = window.run(f"return document.querySelector('#answer-{model} .written').textContent;")
            assert shown.removesuffix(" [ends here]") == tokenizer.decode(ids).rstrip("\ufffd")
        rows = window.run(
            "return [...document.querySelectorAll('#models tr')].map((row) => row.innerText.split('\\t'));"
        )
        assert all(float(row[2]) > 0 and 0 < int(row[3]) <= 9 for row in rows)
        text = window.run("return document.body.innerText;")
        assert "tokens per second" in text and "tokens" in window.run(
            "return document.getElementById('agreement').textContent;"
        )
        assert not window.log()


def test_a_start_that_cannot_be_continued_is_told_so(window: Browser, writer: Any) -> None:
    wrong = {
        ("text-1", ""): "Enter a text; the model has no sign for the start of one.",
        ("text-1", "一二三四" * 90): "tokens, and the model takes at most 512",
        ("count", "x"): "Tokens is a whole number from 1 to 2000.",
        ("temperature", 9): "Temperature is a number from 0 to 2",
    }
    script = """const field = document.getElementById(args[0]);
        const before = field.value;
        field.value = args[1];
        document.getElementById("write").click();
        field.value = before;
        return document.getElementById("said").textContent;"""
    with served(writer[0].path) as (address, _):
        window.open(address)
        window.wait(DONE)
        for (field, value), words in wrong.items():
            assert words in window.run(script, field, value)


def test_writing_can_be_stopped_and_goes_on_afterwards(window: Browser, writer: Any) -> None:
    with served(writer[0].path) as (address, _):
        window.open(address)
        window.wait(DONE)
        window.run("""document.getElementById("count").value = 2000; document.getElementById("temperature").value = 1;
            document.getElementById("write").click(); await new Promise((go) => setTimeout(go, 300));
            document.getElementById("stop").click();""")
        window.wait("!document.getElementById('write').disabled")
        assert window.run("return document.getElementById('stop').hidden;")
        assert window.run("return document.documentElement.scrollWidth <= innerWidth;")


def test_a_server_that_sends_scripts_as_something_else_is_named(window: Browser, writer: Any) -> None:
    with served(writer[0].path, types={".mjs": "text/plain"}) as (address, _):
        window.open(address)
        window.wait("document.body.dataset.state === 'failed'")
        said = window.run(FAILURE)
        assert "the server sends runtime/ort.wasm.min.mjs as text/plain" in said and "text/javascript" in said
    window.log()


def test_what_is_no_picture_is_told_so_and_the_next_picture_works(
    window: Browser, models: Any, runtime: Path, tmp_path: Path
) -> None:
    page = nc.export.web(models[0], tmp_path / "page", runtime=runtime, options=PageOptions(runs=2, warmup=1))
    drop = """const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(args[0])], "a.png"));
        document.querySelector(".drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));"""
    dot = png(np.full((1, 1, 3), 200, np.uint8))
    with served(page.path) as (address, _):
        window.open(address)
        window.wait("document.body.dataset.state === 'ready'")
        window.run(drop, list(b"no picture"))
        window.wait("document.body.dataset.state === 'failed'")
        assert "not a picture that the browser can read" in window.run(FAILURE)
        window.run(drop, list(dot))
        window.wait(DONE)
        assert window.run("return document.getElementById('failure').hidden;")


def test_half_precision_goes_in_and_comes_out(window: Browser, runtime: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
             helper.make_node("MatMul", ["wide", "w"], ["product"]),
             helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT16)]  # fmt: skip
    x, y = (graphs.value(name, ["batch", side], TensorProto.FLOAT16) for name, side in (("x", 3), ("y", 2)))
    onnx.save(graphs.model(nodes, [x], [y], [graphs.constant(graphs.normal(3, 2, seed=4), "w")]), tmp_path / "f.onnx")
    nc.save(nc.quantize(str(tmp_path / "f.onnx"), "weight-int8", progress=False), tmp_path / "int8.onnx")
    data = [np.array([[0.5, -2, 3]], np.float16)]
    page = nc.export.web(tmp_path / "int8.onnx", tmp_path / "page", data, runtime=runtime,
                         options=PageOptions(runs=2, warmup=1))  # fmt: skip
    assert page.parity["quantized"] > 50
    with served(page.path) as (address, _):
        window.open(address)
        window.wait(DONE)
        shown = window.run(
            "return [...document.querySelectorAll('#answer .share')].map((one) => Number(one.textContent));"
        )
    (wanted,) = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx")).run(None, {"x": data[0]})
    np.testing.assert_allclose(shown, wanted[0].astype(np.float32), rtol=1e-3)
