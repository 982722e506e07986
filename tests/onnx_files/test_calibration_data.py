"""Every form of calibration data runs through an ONNX model, or an error says what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort_quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.data import ImageFolder, Preprocessing
from narrowcast.errors import DataError

IMAGES = graphs.normal(40, 3, 12, 12, seed=9)


class Once:
    """A calibration reader as ONNX Runtime's examples have it: it has no way back."""

    def __init__(self) -> None:
        self.rows = iter(range(0, 40, 8))

    def get_next(self) -> dict[str, Any] | None:
        start = next(self.rows, None)
        return None if start is None else {"x": IMAGES[start : start + 8]}


class Rewound(Once):
    def rewind(self) -> None:
        self.rows = iter(range(0, 40, 8))


class Ranged(Once):
    def __len__(self) -> int:
        return 40

    def set_range(self, start: int, end: int) -> None:
        self.rows = iter(range(start, end, 8))


class OfOnnxRuntime(ort_quantization.CalibrationDataReader):
    """Of the base class, which is an iterator and has a set_range that raises."""

    def __init__(self) -> None:
        self.inside = Once()

    def get_next(self) -> dict[str, Any] | None:
        return self.inside.get_next()


def batches() -> Iterator[Any]:
    yield from (IMAGES[start : start + 8] for start in range(0, 40, 8))


def inputs(data: Any) -> list[str]:
    """The ranges that a model gets from the data, as the report has them."""
    report = nc.quantize(graphs.residual_network(), "static-int8", data, progress=False).report
    return [row.input for row in report.layers]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return inputs(list(batches()))


def test_all_forms_of_the_same_numbers_give_the_same_ranges(expected: list[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "stored.npz", x=IMAGES)
    np.savez_compressed(tmp_path / "packed.npz", x=IMAGES, labels=np.arange(40))
    np.save(tmp_path / "array.npy", IMAGES)
    forms = [
        IMAGES, batches(), {"x": IMAGES}, [{"x": batch} for batch in batches()], Once(), Rewound(), Ranged(),
        OfOnnxRuntime(), tmp_path / "stored.npz", str(tmp_path / "packed.npz"), tmp_path / "array.npy",
        (IMAGES, np.arange(40)),
    ]  # fmt: skip
    for form in forms:
        assert inputs(form) == expected, type(form).__name__


def test_a_reader_with_a_way_back_is_read_from_its_start_whoever_had_it_before(expected: list[str]) -> None:
    for reader in (Rewound(), Ranged()):
        assert inputs(reader) == inputs(reader) == expected


def test_a_reader_without_a_way_back_says_so_when_it_is_read_again() -> None:
    reader = Once()
    inputs(reader)
    with pytest.raises(DataError, match=r"Once.*holds no batch; .*read only once"):
        inputs(reader)


def test_a_reader_that_returns_no_dictionary_is_refused() -> None:
    reader = Once()
    reader.get_next = lambda: IMAGES[:8]  # type: ignore[method-assign, assignment]
    with pytest.raises(DataError, match=r"batch 0: get_next\(\) of Once returned a ndarray; .*None at the end"):
        inputs(reader)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"image": IMAGES}, "'image'.*takes x"),
        ({"x": (IMAGES * 40).astype(np.uint8)}, r"'x' wants tensor\(float\).*uint8; convert it as in training"),
        ({"x": IMAGES[0]}, r"the shape \[3, 12, 12\]; give 4 axes"),
        ({"x": IMAGES.transpose(0, 2, 3, 1)}, "takes images as NCHW"),
        ({"x": IMAGES[:, :, :8, :8]}, r"\['batch', 3, 12, 12\], and the data has the shape \[40, 3, 8, 8\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named_with_what_the_model_wants(batch: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        inputs([batch])


def tokens(names: tuple[str, str] = ("input.1", "mask")) -> Any:
    """Two inputs, one with a name that no Python parameter can have."""
    nodes = [
        onnx.helper.make_node("Gather", ["table", names[0]], ["found"]),
        onnx.helper.make_node("Mul", ["found", names[1]], ["masked"]),
        onnx.helper.make_node("MatMul", ["masked", "weight"], ["y"]),
    ]
    constants = [graphs.constant(graphs.normal(20, 16), "table"), graphs.constant(graphs.normal(16, 4), "weight")]
    given = [graphs.value(names[0], ["n"], onnx.TensorProto.INT32), graphs.value(names[1], ["n", 1])]
    return graphs.model(nodes, given, [graphs.value("y", ["n", 4])], constants)


def test_inputs_with_any_name_go_by_position_or_by_name_and_whole_numbers_fit_or_are_refused() -> None:
    ids, mask = np.arange(20) % 20, np.ones((20, 1), np.float32)
    for data in ([(ids, mask)], [{"input.1": ids, "mask": mask}], [(ids, mask, np.zeros(20))]):
        report = nc.quantize(tokens(), "static-int8", data, progress=False).report
        assert report.layers[-1].outcome == "quantized"
    assert any("taken as the target" in note for note in report.notes)
    with pytest.raises(DataError, match=r"'input\.1' wants tensor\(int32\).*do not fit"):
        nc.quantize(tokens(), "static-int8", [(ids + 2**40, mask)], progress=False)
    with pytest.raises(DataError, match=r"'input\.1' wants tensor\(int32\).*float32; give whole numbers, int32"):
        nc.quantize(tokens(), "static-int8", [(ids.astype(np.float32), mask)], progress=False)


def test_a_folder_of_images_wants_its_preprocessing_declared(expected: list[str], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    for index, each in enumerate(pixels):
        image.fromarray(each).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"is a folder; say how .*Preprocessing\(side=224"):
        inputs(tmp_path)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    floats = ((pixels / np.float32(255) - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)
    assert inputs(ImageFolder(tmp_path, Preprocessing(mean=mean, std=std), batch_size=2)) == inputs(floats)
    (other,) = ImageFolder(tmp_path, Preprocessing(side=6, divisor=1, layout="NHWC", order="BGR"))
    assert other.shape == (6, 6, 6, 3) and other.dtype == torch.float32 and float(other.max()) > 1
    (grey,) = ImageFolder(tmp_path, Preprocessing(order="L"))
    assert grey.shape == (6, 1, 12, 12)
    with pytest.raises(DataError, match="layout 'CHW'"):
        Preprocessing(layout="CHW")
