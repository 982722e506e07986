"""The page in a headless browser: it loads nothing from elsewhere, predicts what ONNX Runtime does, and times it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

import torch
from tests.onnx_files import graphs
from tests.web.browser import Browser, browser, served, why_not

import narrowcast as nc
from narrowcast.export import PageOptions

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pictures() -> Any:
    return np.random.default_rng(5).integers(0, 256, (6, 12, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def page(models: Any, runtime: Path, pictures: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A page with both models and six example pictures; also what was said of it."""
    folder = tmp_path_factory.mktemp("pages") / "page"
    options = PageOptions(mean=MEAN, std=STD, runs=5, warmup=1)
    made = nc.export.web(models[0], folder, [prepared(pictures)], reference=models[1], runtime=runtime, options=options)
    return made


def prepared(pixels: Any) -> torch.Tensor:
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def answer(file: Path, feeds: Any) -> Any:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def shown(window: Browser, model: str) -> list[tuple[int, str]]:
    """Classes and percentages, the first one first."""
    script = f"""return [...document.querySelectorAll("#answer-{model} li")]
        .map((item) => [Number(item.dataset.class), item.querySelector(".share").textContent]);"""
    return [tuple(entry) for entry in window.run(script)]


def expected(values: Any) -> list[tuple[int, str]]:
    powers = np.exp(values.astype(np.float64) - values.max())
    share = powers / powers.sum()
    return [(int(i), f"{100 * share[i]:.1f} %") for i in np.argsort(-share, kind="stable")[:5]]


def test_webassembly_answers_as_the_cpu_does(page: Any) -> None:
    assert page.parity["quantized"] > 60 and page.parity["float32"] > 100
    assert not page.warnings


def test_the_page_predicts_what_onnx_runtime_predicts(window: Browser, page: Any, pictures: Any) -> None:
    with served(page.path) as (address, asked):
        window.open(address)
        window.wait("document.body.dataset.state === 'timed'")
        for index in (0, 3):
            script = """const before = document.getElementById("agreement").textContent;
                document.querySelectorAll(".pictures button")[args[0]].click();
                while (document.getElementById("agreement").textContent === before)
                  await new Promise((go) => setTimeout(go, 20));"""
            if index:
                window.run(script, index)
            x = {"x": prepared(pictures[index : index + 1]).numpy()}
            assert shown(window, "quantized") == expected(answer(page.path / "quantized.onnx", x)[0])
            assert shown(window, "float32") == expected(answer(page.path / "float32.onnx", x)[0])
        times = window.run(
            "return ['quantized', 'float32'].map((m) => Number(document.getElementById('row-' + m).dataset.ms));"
        )
        assert all(0 < milliseconds < 10_000 for milliseconds in times)
        text = window.run("return document.body.innerText;")
        assert "of the size" in text and "tried so far, the two agree on" in text and "1 thread" in text
        assert window.run("return document.getElementById('failure').hidden;")
        assert not window.log()
        loaded = window.run("return performance.getEntriesByType('resource').map((entry) => entry.name);")
        assert asked and all(name.startswith((address, "blob:", "data:")) for name in loaded)


def test_the_page_can_be_used_and_read_without_a_mouse_and_on_a_phone(window: Browser, page: Any) -> None:
    with served(page.path) as (address, _):
        window.open(address)
        window.wait("document.body.dataset.state === 'timed'")
        window.cdp(
            "Emulation.setDeviceMetricsOverride", {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": False}
        )
        assert window.run("return document.documentElement.scrollWidth <= 320;")
        window.cdp("Emulation.clearDeviceMetricsOverride", {})
        unnamed = """return [...document.querySelectorAll("button, input, textarea, img, canvas, progress")]
            .filter((one) => one.checkVisibility() && !(one.textContent.trim() || one.ariaLabel || one.alt
              || one.labels?.length || one.querySelector("img[alt]"))).map((one) => one.outerHTML);"""
        assert window.run(unnamed) == []
        assert window.run(
            "return document.documentElement.lang === 'en' && document.querySelectorAll('h1').length === 1;"
        )


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground_in_both_colour_schemes(window: Browser, page: Any, dark: bool) -> None:
    with served(page.path) as (address, _):
        window.open(address)
        window.wait("document.body.dataset.state === 'timed'")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        window.cdp("Emulation.setEmulatedMedia", {"features": scheme})
        pairs = {"--text": "--ground", "--soft": "--card", "--on-accent": "--accent", "--bad": "--bad-soft"}
        colours = window.run(
            """const style = getComputedStyle(document.documentElement);
            return args[0].map((pair) => pair.map((name) => style.getPropertyValue(name).trim()));""",
            [list(pair) for pair in pairs.items()],
        )
        assert all(contrast(*pair) >= 4.5 for pair in colours), colours


def contrast(first: str, second: str) -> float:
    """The ratio of luminances that WCAG 2 defines, of two colours like #1a2b3c."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_threads_are_used_where_the_server_isolates_the_page(window: Browser, page: Any) -> None:
    with served(page.path, isolated=True) as (address, _):
        window.open(address)
        window.wait("document.body.dataset.state === 'timed'")
        assert window.run("return crossOriginIsolated;")
        cores = window.run("return navigator.hardwareConcurrency;")
        wanted = "1 thread." if cores == 1 else f"{min(4, cores)} threads."
        assert wanted in window.run("return document.getElementById('machine').textContent;")


def test_a_damaged_copy_of_a_page_says_which_file_is_wrong(window: Browser, page: Any, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(page.path, tmp_path / "copy")
    with (folder / "quantized.onnx").open("r+b") as file:
        file.truncate(1000)
    with served(folder) as (address, _):
        window.open(address)
        window.wait("document.body.dataset.state === 'failed'")
        assert "quantized.onnx has 1000 bytes" in window.run("return document.getElementById('failure').textContent;")


def test_numbers_are_predicted_as_they_are_typed(window: Browser, runtime: Path, tmp_path: Path) -> None:
    weight = graphs.normal(3, 2, seed=4)
    onnx.save(graphs.one("MatMul", weight, ["batch", 3]), tmp_path / "float.onnx")
    nc.save(nc.quantize(str(tmp_path / "float.onnx"), "weight-int8", progress=False), tmp_path / "int8.onnx")
    options = PageOptions(runs=3, warmup=1)
    page = nc.export.web(tmp_path / "int8.onnx", tmp_path / "page", runtime=runtime, options=options)
    with served(page.path) as (address, _):
        window.open(address)
        window.wait("document.body.dataset.state === 'timed'")
        script = """const fields = [...document.querySelectorAll("#input input")];
            fields.forEach((field, i) => {
              field.value = i + 1;
              field.dispatchEvent(new Event("input", { bubbles: true }));
            });
            return fields.length;"""
        assert window.run(script) == 3
        window.wait("document.querySelector('#answer .share')?.textContent !== '0.0000'")
        given = window.run(
            "return [...document.querySelectorAll('#answer .share')].map((one) => Number(one.textContent));"
        )
        wanted = answer(tmp_path / "int8.onnx", {"x": np.array([[1, 2, 3]], np.float32)})[0]
        np.testing.assert_allclose(given, wanted, rtol=1e-3)
