"""The ONNX table: targets judged from its rows, the page, Silero's score, which files are timed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import low_bits_cells, onnx_join, onnx_page, onnx_targets, onnx_vad, results_io
from benchmarks.kit import MissingDataError
from benchmarks.kit.base import data_folder
from benchmarks.onnx_cases import CASES, case
from benchmarks.onnx_tools import TOOLS, tool

FACTS = {"cpu": "none", "cores": 1, "memory_gib": 1, "load_average": [0], "python": "3", "packages": {},
         "narrowcast": "", "commit": "", "date": ""}  # fmt: skip


def row(name: str, method: str, score: float, sqnr: float, integer: int = 4, model: str = "resnet20") -> dict[str, Any]:
    return {"model": model, "format": "score", "tool": name, "method": method, "score": score, "float32": 90.0,
            "difference": score - 90.0, "interval": (0.0, 0.0), "sqnr_db": sqnr, "agreement": 99.0, "bytes": 1000,
            "integer": integer, "products": 4, "floats": [], "seconds": 1.0}  # fmt: skip


def timing(**milliseconds: float) -> dict[str, Any]:
    names = {key.replace("_", " "): value for key, value in milliseconds.items()}
    return {"model": "resnet20", "format": "latency 1", "method": "1 threads", "load_average": 1.0, "milliseconds": {
        name: {"median": value, "best": value, "rounds": [value, value]} for name, value in names.items()}}  # fmt: skip


def verdicts(scores: list[Any], timings: list[Any] = ()) -> dict[str, str]:  # type: ignore[assignment]
    return {found["target"]: found["verdict"] for found in onnx_targets.judged(scores, list(timings))}


def test_the_better_of_onnx_runtimes_ways_is_the_rival() -> None:
    rivals = [row("ONNX Runtime", "static U8S8", 89.0, 30.0), row("ONNX Runtime", "static S8S8", 88.0, 32.0)]
    found = verdicts([row("narrowcast", "static-int8", 89.0, 31.0), *rivals])
    assert found["static-int8: score no worse than ONNX Runtime's quantizer"] == "met"
    assert found["static-int8: SQNR no worse than ONNX Runtime's quantizer"] == "**missed**"


def test_lower_is_better_for_perplexity() -> None:
    rival = row("ONNX Runtime", "dynamic", 5.0, 20.0, model="textgenrnn")
    better = verdicts([row("narrowcast", "dynamic-int8", 4.9, 21.0, model="textgenrnn"), rival])
    worse = verdicts([row("narrowcast", "dynamic-int8", 5.1, 21.0, model="textgenrnn"), rival])
    target = "dynamic-int8: score no worse than ONNX Runtime's quantizer"
    assert (better[target], worse[target]) == ("met", "**missed**")


def test_one_float_product_misses_the_kernel_target() -> None:
    target = "static-int8: every product that it asks for is an integer kernel"
    assert verdicts([row("narrowcast", "static-int8", 90.0, 40.0, 3)])[target] == "**missed**"
    assert verdicts([row("narrowcast", "static-int8", 90.0, 40.0, 4)])[target] == "met"


def test_latency_is_judged_against_the_fastest_way_and_float32() -> None:
    scores = [row("narrowcast", "static-int8", 90.0, 40.0)]
    times = {"ONNX_Runtime_float32": 2.0, "narrowcast_static-int8": 1.0, "ONNX_Runtime_static_U8S8": 0.9}
    found = verdicts(scores, [timing(**times)])
    assert found["1, 1 threads: static-int8 no slower than ONNX Runtime's quantizer"] == "**missed**"
    assert found["1, 1 threads: faster than float32 if any int8 tool is"] == "met"
    slow = timing(**(times | {"narrowcast_static-int8": 2.5}))
    assert verdicts(scores, [slow])["1, 1 threads: faster than float32 if any int8 tool is"] == "**missed**"


def test_the_page_shows_every_row_and_what_failed() -> None:
    failed = {"model": "resnet20", "tool": "NNCF", "method": "int8 in ONNX Runtime", "failed": "it cannot"}
    document = {"scores": [row("narrowcast", "static-int8", 89.0, 31.0), failed], "timings": [
        timing(ONNX_Runtime_float32=2.0) | {"skipped": {"OpenVINO int8": "it is not there"}}], "skipped": [],
        "versions": {"onnxruntime": "1"}}  # fmt: skip
    page = onnx_page.markdown(FACTS, document, "What it is.")
    for words in ("31.00", "failed: it cannot", "OpenVINO int8: it is not there", "4 of 4", "What it is."):
        assert words in page


def document(commit: str, scores: list[Any], timings: list[Any] = ()) -> dict[str, Any]:  # type: ignore[assignment]
    return {"machine": FACTS | {"commit": commit}, "versions": {}, "skipped": [], "scores": scores,
            "timings": list(timings)}  # fmt: skip


def test_a_later_run_replaces_its_own_rows_and_each_row_names_its_commit() -> None:
    rival = row("ONNX Runtime", "dynamic", 88.0, 20.0)
    earlier = document("aaa", [row("narrowcast", "static-int8", 89.0, 31.0), rival])
    found = onnx_join.joined([earlier, document("bbb", [row("narrowcast", "static-int8", 90.0, 32.0)])])
    assert [(r["method"], r["score"], r["commit"]) for r in found["scores"]] == [
        ("static-int8", 90.0, "bbb"), ("dynamic", 88.0, "aaa")]  # fmt: skip
    assert any(note.startswith("resnet20, not measured: ONNX Runtime float32, narrowcast dynamic-int8")
               for note in found["skipped"])  # fmt: skip


def test_documents_that_share_rows_are_joined_by_date() -> None:
    old, new = ({**row("narrowcast", "static-int8", score, 31.0), "date": date, "commit": date}
                for score, date in ((89.0, "2026-01"), (90.0, "2026-02")))  # fmt: skip
    times = {"ONNX_Runtime_float32": 2.0, "narrowcast_static-int8": 1.0}
    slow, fast = (timing(**times) | {"date": date, "commit": date} for date in ("2026-01", "2026-02"))
    found = onnx_join.joined([document("x", [new], [fast]), document("y", [old], [slow])])
    assert found["scores"] == [new] and found["timings"] == [fast]


def test_a_stopped_cell_does_not_displace_a_measured_one_and_a_failed_one_does() -> None:
    earlier = document("aaa", [row("narrowcast", "static-int8", 89.0, 31.0)])
    cell = {"model": "resnet20", "tool": "narrowcast", "method": "static-int8"}
    stopped = onnx_join.joined([earlier, document("bbb", [cell | {"stopped": 5.0}])])
    failed = onnx_join.joined([earlier, document("bbb", [cell | {"failed": "SomeError"}])])
    assert "score" in stopped["scores"][0] and "score" not in failed["scores"][0]


def test_files_that_are_not_timed_again_keep_the_times_and_anchors_of_their_own_process() -> None:
    times = {"ONNX_Runtime_float32": 2.0, "ONNX_Runtime_dynamic": 2.0}
    earlier = timing(**times, **{"narrowcast_dynamic-int8": 4.0, "OpenVINO_int8": 0.5})
    later = timing(**times, **{"narrowcast_dynamic-int8": 1.0})
    found = onnx_join.joined([document("aaa", [], [earlier]), document("bbb", [], [later])])
    kept, new = found["timings"]
    assert (set(kept["milliseconds"]), kept["commit"]) == (
        {"ONNX Runtime float32", "ONNX Runtime dynamic", "OpenVINO int8"}, "aaa")  # fmt: skip
    assert new == later | {"commit": "bbb"}
    targets = onnx_targets.judged([row("narrowcast", "dynamic-int8", 90.0, 30.0)], found["timings"])
    rows = {r["target"]: r["number"] for r in targets if "1 threads" in r["target"]}
    assert rows == {
        "1, 1 threads: dynamic-int8 no slower than ONNX Runtime's quantizer": "2.00x, the fastest calls 2.00x",
        "1, 1 threads: faster than float32 if any int8 tool is": "2.00x; fastest OpenVINO int8 4.00x",
    }
    again = onnx_join.joined([found, document("ccc", [], [earlier])])
    assert [r["commit"] for r in again["timings"]] == ["ccc"]


def test_other_presets_are_held_against_the_bounds_of_calibrated_modules() -> None:
    found = verdicts([row("narrowcast", "weight-int8", 90.0, 37.0), row("narrowcast", "fp16", 90.0, 60.0)])
    assert found == {"weight-int8: sqnr_db at least 38, as for PyTorch": "**missed**"}


def test_the_committed_table_can_be_joined_with_itself() -> None:
    path = results_io.folder_of(True) / "onnx.json"
    committed = json.loads(path.read_text(encoding="utf-8"))
    found = onnx_join.joined([committed, committed])
    assert len(found["scores"]) == len(committed["scores"])
    assert all(row["commit"] for row in [*found["scores"], *found["timings"]])
    onnx_page.markdown(found["machine"], found, "")


def test_a_stopped_cell_takes_the_processes_that_it_started_with_it(tmp_path: Path) -> None:
    inner = f"import time, pathlib; time.sleep(1.0); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    cell = low_bits_cells.Cell("m", "f", "t", "x", "s", (sys.executable, "-c", outer), "d")
    assert low_bits_cells.measure(cell, 0.4)["stopped"] == 0.4
    time.sleep(1.2)
    assert not (tmp_path / "alive").exists()


def test_every_case_has_a_kind_that_tools_know_and_every_tool_a_name_of_its_own() -> None:
    kinds = {kind for found in TOOLS for kind in found.kinds}
    assert {case(name).kind for name in CASES} <= kinds
    assert len({found.name for found in TOOLS}) == len(TOOLS)
    assert all(tool(found.name) is found for found in TOOLS)


def test_the_area_under_the_curve_counts_pairs_in_the_right_order() -> None:
    speech = np.array([True, True, False, False])
    assert onnx_vad.score(np.array([0.9, 0.8, 0.1, 0.2]), speech) == 100.0
    assert onnx_vad.score(np.array([0.9, 0.1, 0.8, 0.2]), speech) == 50.0
    assert onnx_vad.score(np.array([0.5, 0.5, 0.5, 0.5]), speech) == 50.0


def test_frames_of_a_clip_carry_the_end_of_the_one_before() -> None:
    audio = np.arange(1200, dtype=np.float32)
    first, second = onnx_vad.frames(audio)
    assert first.shape == (1, 576) and not first[0, :64].any()
    assert np.array_equal(second[0], audio[512 - 64 : 1024])


def test_calibration_clips_are_not_scored() -> None:
    for chosen in onnx_vad.SETS.values():
        assert chosen.start >= onnx_vad.CALIBRATION_CLIPS


def test_the_published_files_score_as_the_manifest_says() -> None:
    try:
        data_folder("silero_vad")
    except MissingDataError as missing:
        pytest.skip(str(missing))
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from benchmarks.onnx_tools import ORT, session

    infer, names = session(onnx_vad.source("silero_vad_fixed"), ORT, 1)
    got = onnx_vad.outputs(infer, names, "quick")
    speech = np.concatenate([labels for _, labels in onnx_vad.clips()[onnx_vad.SETS["quick"]]])
    assert got.shape == (len(speech), 1)
    assert onnx_vad.score(got[:, 0].numpy(), speech) > 91.5
    assert isinstance(got, torch.Tensor)
