"""One pass over the data serves every observer; interrupted it goes on, finished it is reused, with the same result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.models import onnx_watch
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.observers import make_observer
from narrowcast.pipeline import onnx_statistics

IMAGES = [graphs.normal(6, 3, 12, 12, seed=20 + index) * (1 + index % 3) for index in range(5)]
MIXED = {
    "rule": [
        {"layers": "stem", "weight": "int8", "input": "uint8/tensor static:entropy"},
        {"layers": "depthwise", "weight": "int8", "input": "uint8/tensor static:percentile(99.5)"},
        {"layers": "head", "weight": "int8", "input": "uint8/tensor static:mse"},
    ]
}


class StoppedError(Exception):
    pass


def until(count: int) -> Iterator[Any]:
    yield from IMAGES[:count]
    raise StoppedError


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows ran through the watched model, run by run."""
    seen: list[int] = []
    original = onnx_watch.Watching.run

    def run(self: Any, feeds: Any) -> Any:
        seen.append(len(feeds["x"]))
        return original(self, feeds)

    monkeypatch.setattr(onnx_watch.Watching, "run", run)
    return seen


def quantized(recipe: Any = MIXED, data: Any = IMAGES, **options: Any) -> Any:
    return nc.quantize(graphs.residual_network(), recipe, data, progress=False, **options)


def constants(result: Any) -> dict[str, Any]:
    return {str(name): value.const_value.numpy() for name, value in result.model.graph.graph.initializers.items()}


def same(first: Any, second: Any) -> bool:
    mine, theirs = constants(first), constants(second)
    return set(mine) == set(theirs) and all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_one_pass_serves_layers_with_different_observers(runs: list[int]) -> None:
    result = quantized()
    assert sum(runs) == 30 + 1  # one row to see how large the values are
    model = OnnxModel(graphs.residual_network())
    for row, text in zip(result.report.layers, ("entropy", "percentile(99.5)", "mse"), strict=True):
        observer = make_observer(text)
        path = next(layer for layer in model.layers() if layer.name == row.layer).sites[0].path
        model.observe(IMAGES, {}, {model.input_value(path): [observer.update]})
        low, high = observer.range()
        assert row.input == f"uint8/tensor [{low:.4g}, {high:.4g}]"


def test_all_observers_watch_one_value_in_one_pass(runs: list[int]) -> None:
    model = OnnxModel(graphs.residual_network())
    observers = [make_observer(text) for text in ("minmax", "moving_average", "percentile", "entropy", "mse")]
    model.observe(IMAGES, {}, {"b": [observer.update for observer in observers]})
    assert sum(runs) == 30 + 1
    ranges = [observer.range() for observer in observers]
    assert len(set(ranges)) == 5 and all(ranges[0][1] >= high for _, high in ranges)


def choice(observer: str) -> dict[str, Any]:
    return {"rule": [{"weight": "int8", "input": f"uint8/tensor static:{observer}"}]}


def test_several_observers_choose_the_range_of_a_layer_in_one_pass(runs: list[int]) -> None:
    result = quantized(choice("best(mse, percentile(99.5), minmax)"))
    assert sum(runs) == 30 + 1
    for row in result.report.layers:
        assert " by mse " in row.input and "minmax [" in row.input and "percentile(99.5) [" in row.input
    assert any("by the least squared error over the calibration data: mse" in note for note in result.report.notes)
    assert same(result, quantized(choice("mse")))


def test_statistics_of_several_observers_serve_one_of_them_alone(tmp_path: Path, runs: list[int]) -> None:
    first = quantized(choice("best(minmax,percentile(99.5))"), resume=tmp_path)
    runs.clear()
    assert same(first, quantized(choice("best(minmax,percentile(99.5))"), resume=tmp_path)) and not runs
    alone = quantized(choice("percentile(99.5)"), resume=tmp_path)
    assert not runs and same(alone, quantized(choice("percentile(99.5)")))


def test_memory_of_a_pass_is_that_of_a_few_rows_and_the_answer_the_same(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantized()
    runs.clear()
    monkeypatch.setattr(onnx_watch, "WATCHED_BYTES", 40_000)
    result = quantized()
    assert len(runs) > 10 and max(runs) < 6
    assert same(result, expected)


def test_rows_that_see_each_other_run_together(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_watch, "WATCHED_BYTES", 1000)
    helper = onnx.helper
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["c"]),
        helper.make_node("MatMul", ["c", "layer.weight"], ["y"]),
    ]
    constant = graphs.constant(graphs.normal(16, 4), "layer.weight")
    model = graphs.model(nodes, [graphs.value("x", ["n", 16])], [graphs.value("y", ["n", 4])], [constant])
    x = graphs.normal(50, 16) + 5
    report = nc.quantize(model, "static-int8", [x], progress=False).report
    assert set(runs[1:]) == {50}
    centred = x - x.mean(0)
    assert report.layers[0].input == f"uint8/tensor [{centred.min():.4g}, {centred.max():.4g}]"


def test_an_interrupted_pass_goes_on_where_it_stopped_with_the_same_result(
    tmp_path: Path, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantized()
    monkeypatch.setattr(onnx_statistics, "SECONDS", 0.0)
    with pytest.raises(StoppedError):
        quantized(data=until(3), resume=tmp_path)
    runs.clear()
    result = quantized(resume=tmp_path)
    assert sum(runs) == 12 + 1
    assert same(result, expected)
    assert f"of 3 batches were reused from {tmp_path}, and 2 more were run" in "\n".join(result.report.notes)
    macs = [row.macs for row in expected.report.layers]
    assert macs == [row.macs for row in result.report.layers] and all(macs)


def test_a_second_run_on_the_same_model_and_data_runs_no_model(tmp_path: Path, runs: list[int]) -> None:
    first = quantized(resume=tmp_path)
    assert "of 5 batches were written" in "\n".join(first.report.notes)
    runs.clear()
    second = quantized(resume=tmp_path, data=iter(IMAGES))
    assert not runs and same(first, second)
    assert "of 5 batches were reused" in "\n".join(second.report.notes)


def test_statistics_of_gptq_are_reused_too(tmp_path: Path, runs: list[int]) -> None:
    recipe = {"rule": [{"type": "Linear", "weight": "int4/group32", "method": "gptq"}]}
    first = quantized(recipe, resume=tmp_path)
    runs.clear()
    assert same(first, quantized(recipe, resume=tmp_path)) and not runs


def test_other_data_is_told_apart_and_another_model_begins_anew(tmp_path: Path, runs: list[int]) -> None:
    quantized(resume=tmp_path)
    with pytest.raises(nc.CheckpointError, match="of other data: the first 5 batches are not the same"):
        quantized(resume=tmp_path, data=[*IMAGES[:4], IMAGES[0]])
    with pytest.raises(nc.CheckpointError, match="of 5 batches, and the data has 3"):
        quantized(resume=tmp_path, data=IMAGES[:3])
    model = graphs.residual_network()
    model.graph.initializer[0].CopyFrom(graphs.constant(graphs.normal(8, 3, 3, 3, seed=99), "stem.weight"))
    runs.clear()
    nc.quantize(model, MIXED, IMAGES, progress=False, resume=tmp_path)
    assert runs and len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_and_a_directory_that_cannot_be_are_named(tmp_path: Path) -> None:
    quantized(resume=tmp_path / "a")
    (file,) = (tmp_path / "a").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(nc.CheckpointError, match=r"is damaged .*delete it"):
        quantized(resume=tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(nc.CheckpointError, match="cannot be made a directory"):
        quantized(resume=tmp_path / "b")


def test_two_layers_that_want_other_ranges_of_one_value_get_the_first_and_are_told() -> None:
    helper = onnx.helper
    nodes = [helper.make_node("MatMul", ["x", f"{name}.weight"], [name]) for name in ("left", "right")]
    nodes.append(helper.make_node("Add", ["left", "right"], ["y"]))
    weights = [graphs.constant(graphs.normal(16, 4), f"{name}.weight") for name in ("left", "right")]
    model = graphs.model(nodes, [graphs.value("x", ["n", 16])], [graphs.value("y", ["n", 4])], weights)
    rules = [{"layers": name, "weight": "int8", "input": f"uint8/tensor static:{text}"}
             for name, text in (("left", "minmax"), ("right", "percentile"))]  # fmt: skip
    notes = nc.quantize(model, {"rule": rules}, [torch.randn(8, 16)], progress=False).report.notes
    assert any("right: its input 'x'" in note and "by minmax" in note for note in notes)
