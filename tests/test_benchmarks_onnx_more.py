"""Commands of smaller ONNX tables: algorithms on both roads, and WebAssembly; their pages, and one cell of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import onnx_algorithms, onnx_web
from benchmarks.kit import KIT_NAMES, MissingDataError, kit_model

from narrowcast.recipe import Recipe

FACTS = {"cpu": "none", "cores": 1, "memory_gib": 1, "load_average": [0], "python": "3", "packages": {},
         "narrowcast": "", "commit": "", "date": ""}  # fmt: skip


def row(road: str, sqnr: float, recipe: str = "rtn", commit: str = "aaaaaaaaaa") -> dict[str, Any]:
    return {"model": "mobilenetv1", "recipe": recipe, "road": road, "float32": 83.0, "commit": commit, "load": 1.0,
            "sqnr_db": sqnr, "score": 80.0, "seconds": 2.0}  # fmt: skip


def test_every_recipe_is_one_and_every_model_of_the_kit() -> None:
    for name in onnx_algorithms.RECIPES:
        assert Recipe.from_dict(onnx_algorithms.recipe_of(name)).name == name
    assert {*onnx_algorithms.MODELS, *onnx_web.MODELS} <= set(KIT_NAMES)
    assert all(set(recipes) <= set(onnx_algorithms.RECIPES) for recipes in onnx_algorithms.MODELS.values())


def test_a_line_has_both_roads_and_what_is_missing_is_said() -> None:
    failed = {key: value for key, value in row("file", 0.0, "gptq").items() if key != "sqnr_db"} | {
        "failed": "it cannot"
    }
    rows = onnx_algorithms.with_earlier([row("file", 10.5), failed], [])
    page = onnx_algorithms.markdown(FACTS, {"rows": rows, "skipped": ["minilm: skipped"]})
    assert "| mobilenetv1 | rtn | 10.50 | 80.00 | not measured |  | 83.00 | 2 | aaaaaaaa |" in page
    assert "it cannot" in page and "minilm: skipped" in page


def test_rows_of_an_earlier_run_stay_where_the_later_has_none() -> None:
    earlier = [row("file", 10.0), row("module", 11.0), row("file", 18.0, "gptq")]
    rows = onnx_algorithms.with_earlier([row("file", 12.0, commit="b")], earlier)
    assert [(r["recipe"], r["road"], r["sqnr_db"]) for r in rows] == [
        ("rtn", "file", 12.0), ("rtn", "module", 11.0), ("gptq", "file", 18.0)]  # fmt: skip


def test_calibration_is_cut_at_its_number_of_rows() -> None:
    try:
        batches = onnx_algorithms.calibration(kit_model("mobilenetv1"))
    except MissingDataError as missing:
        pytest.skip(str(missing))
    assert sum(map(len, batches)) == onnx_algorithms.ROWS


def test_the_page_of_webassembly_tells_equal_outputs_from_a_distance_and_names_failures() -> None:
    times = {"sqnr_db": 120.0, "cpu_ms": [4.0, 2.0, 3.0], "equal_top1": 8}
    found = {"model": "resnet20", "preset": "static-int8", "commit": "abcdefgh1", "onnxruntime-web": "1.2", "load": 1.0,
             "inputs": 8, "bytes": {"float32": 2_000_000, "quantized": 500_000}, "float32": times,
             "quantized": times | {"sqnr_db": float("inf"), "cpu_ms": [2.0, 1.0, 1.0]}}  # fmt: skip
    failed = {key: found[key] for key in ("model", "preset", "commit", "onnxruntime-web", "load")} | {
        "failed": "no kernel"
    }
    page = onnx_web.markdown(FACTS, {"rows": [found, failed], "skipped": []})
    assert (
        "| 2.00 | 0.50 | equal | 120.0 | 8 of 8 | 3.00 (2.00 to 4.00) | 1.00 (1.00 to 2.00) | 2.00 | abcdefgh |" in page
    )
    assert "no kernel" in page


def test_without_node_nothing_is_measured_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert onnx_web.main(["--models", "resnet20"]) == 1
    assert "nothing is measured: Node.js is not installed" in capsys.readouterr().out


def test_a_folder_without_onnxruntime_web_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    assert onnx_web.main(["--models", "resnet20", "--runtime-from", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().out


def test_arrays_reach_the_script_as_json() -> None:
    plain = onnx_web.plain(np.arange(6, dtype=np.int64).reshape(2, 3))
    assert json.loads(json.dumps(plain)) == {"type": "int64", "data": [0, 1, 2, 3, 4, 5], "dims": [2, 3]}
